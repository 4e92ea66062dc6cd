"""Ask for the model on a device without kernels: `python try_other_device.py JOB.json RESULT.json`.

The job is the device's type; the result is the error. In a process of its own: vLLM configures the one it is in.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace as Fake

from vllm_ext.models import limits


def main() -> None:
    device_type = json.loads(Path(sys.argv[1]).read_text())
    limits.current_platform = Fake(device_type=device_type, is_cuda=lambda: False)
    config = Fake(model_config=Fake(hf_config=Fake(spec=None)))
    try:
        limits.SalaLimits.verify_and_update_config(config)
    except NotImplementedError as error:
        Path(sys.argv[2]).write_text(json.dumps(str(error)))


if __name__ == "__main__":
    main()
