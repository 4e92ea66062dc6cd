"""The ``jobs`` section of the settings: retention, bounds, and how fast a dead replica is noticed."""

from __future__ import annotations

from sala_serve.settings import PositiveInt, Seconds, Section


class JobsSettings(Section):
    """Stored responses, background jobs, files and batches."""

    max_running_responses: PositiveInt = 64
    """Background responses this replica has handed to the scheduler at once; more wait in Redis."""
    max_running_batches: PositiveInt = 4
    """Batches this replica runs at once."""
    batch_tier: str = "batch"
    """Service tier of the lines of batches, if `tenants.tiers` has it; else the tenant's own."""
    batch_concurrency: PositiveInt = 8
    """Lines of one batch that run at once."""
    lease_s: Seconds = 10.0
    """How long a job stays with a replica that gives no sign of life; then another one takes it over."""
    heartbeat_s: Seconds = 0.5
    """Between two signs of life, which also bring news of cancellations."""
    poll_s: Seconds = 0.5
    """Between two looks at the queue for work that another replica accepted."""
    max_attempts: PositiveInt = 4
    """Starts of one job, take-overs included; then it fails and is written to the dead letter."""
    backoff_s: Seconds = 1.0
    """Before the second attempt; doubles with each, 60 s at most."""
    queue_timeout_s: Seconds = 86400.0
    """From a background response's creation until it must have started."""
    response_retention_s: Seconds = 7 * 86400.0
    """How long a finished response can be read, continued and deleted."""
    event_retention_s: Seconds = 3600.0
    """How long the events of a finished background response can be read again."""
    response_bytes_per_tenant: PositiveInt = 1024**3
    """Requests and answers kept for one tenant; beyond it the oldest finished ones go first."""
    max_file_bytes: PositiveInt = 200 * 1024 * 1024
    """Of one uploaded file, which Redis holds in memory until it expires or is deleted."""
    file_bytes_per_tenant: PositiveInt = 1024**3
    """Of all files of one tenant, each with 4 KiB more; further uploads are refused. Results of batches count, and
    are stored all the same."""
    file_upload_timeout_s: Seconds = 3600.0
    """For a file to arrive."""
    file_retention_s: Seconds = 30 * 86400.0
    """How long a file is kept unless its upload says otherwise."""
    max_batch_requests: PositiveInt = 50_000
    """Lines of one batch's input file."""
    batch_retention_s: Seconds = 30 * 86400.0
    """How long a finished batch can be looked up."""
