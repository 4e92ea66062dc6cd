{{/* Pod template of an engine; dict: root, name, pool, role (single, leader, worker) */}}
{{- define "sala.enginePod" -}}
{{- $root := .root -}}
{{- $pool := .pool -}}
{{- $model := $pool.model -}}
{{- $isWorker := eq .role "worker" -}}
{{- $folder := ternary (clean (printf "/model/%s" $model.pvc.path)) "/model/checkpoint" (eq $model.source "pvc") -}}
{{- $image := include "sala.image" (dict "root" $root "image" $pool.image) -}}
{{- $gpus := div (int $pool.tensorParallelSize) (int $pool.multiNode.nodes) -}}
metadata:
  labels:
    {{- with $pool.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- include "sala.podLabels" $root | nindent 4 }}
    app.kubernetes.io/component: engine
    sala-serve/pool: {{ .name | quote }}
  {{- with $pool.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "sala.serviceAccountName" $root | quote }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with include "sala.priorityClassName" (dict "root" $root "name" $pool.priorityClassName) }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- with $pool.runtimeClassName }}
  runtimeClassName: {{ . | quote }}
  {{- end }}
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . | quote }}
    {{- end }}
  {{- end }}
  terminationGracePeriodSeconds: {{ include "sala.grace" (dict "what" (printf "engine.pools.%s" .name) "drain" $pool.drain "given" $pool.terminationGracePeriodSeconds "longest" $root.Values.longestRequestSeconds) }}
  securityContext: {{- include "sala.podSecurity" $root | nindent 4 }}
  {{- with $pool.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $pool.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $pool.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if ne $model.source "pvc" }}
  initContainers:
    - name: fetch-model
      image: {{ $image | quote }}
      imagePullPolicy: {{ $pool.image.pullPolicy | quote }}
      {{- if eq $model.source "uri" }}
      command: [sala-serve]
      args: [fetch, {{ $model.uri.url | quote }}, {{ $folder }}, --sha256, {{ $model.uri.sha256 | quote }}]
      env:
        - {name: HOME, value: /tmp}
      {{- else }}
      command: [hf]
      args: [download, {{ $model.hub.repository | quote }}, --revision, {{ $model.hub.revision | quote }}, --local-dir, {{ $folder }}]
      env:
        - {name: HOME, value: /tmp}
        - {name: HF_HOME, value: /tmp/huggingface}
        - {name: HF_HUB_DISABLE_TELEMETRY, value: "1"}
        {{- with $model.hub.existingSecret }}
        - name: HF_TOKEN
          valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: {{ $model.hub.tokenKey | quote }}}}
        {{- end }}
      {{- end }}
      resources:
        requests: {cpu: 500m, memory: 512Mi}
        limits: {memory: 4Gi}
      securityContext: {{- include "sala.containerSecurity" $root | nindent 8 }}
      volumeMounts:
        - {name: model, mountPath: /model}
        - {name: tmp, mountPath: /tmp}
  {{- end }}
  containers:
    - name: engine
      image: {{ $image | quote }}
      imagePullPolicy: {{ $pool.image.pullPolicy | quote }}
      command: [sala-serve]
      args:
        - engine
        - {{ $folder }}
        - --host=0.0.0.0
        - --port=8001
        - --served-model-name={{ $pool.servedModelName }}
        {{- with $pool.maxModelLen }}
        - {{ printf "--max-model-len=%s" . | quote }}
        {{- end }}
        {{- with $pool.dtype }}
        - --dtype={{ . }}
        {{- end }}
        {{- if gt (int $pool.tensorParallelSize) 1 }}
        - --tensor-parallel-size={{ int $pool.tensorParallelSize }}
        {{- end }}
        - --
        # requests that run when the pod ends are answered
        - --shutdown-timeout={{ int $root.Values.longestRequestSeconds }}
        {{- with $pool.maxPositionEmbeddings }}
        - --hf-overrides={{ dict "max_position_embeddings" (int .) | toJson | squote }}
        {{- end }}
        {{- if ne .role "single" }}
        - --nnodes={{ int $pool.multiNode.nodes }}
        - --node-rank=$(LWS_WORKER_INDEX)
        - --master-addr=$(LWS_LEADER_ADDRESS)
        {{- if $isWorker }}
        - --headless
        {{- end }}
        {{- end }}
        {{- range $pool.extraArgs }}
        - {{ . | quote }}
        {{- end }}
      env:
        - {name: HOME, value: /tmp}
        - {name: HF_HUB_OFFLINE, value: "1"}
        - {name: VLLM_NO_USAGE_STATS, value: "1"}
        - {name: VLLM_CACHE_ROOT, value: /tmp/vllm}
        - {name: TRITON_CACHE_DIR, value: /tmp/triton}
        {{- with $pool.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- if not $isWorker }}
      ports:
        - {name: http, containerPort: 8001, protocol: TCP}
      startupProbe:
        httpGet: {path: /health, port: http}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: {{ div (add (int $pool.startupSeconds) 9) 10 }}
      # an engine in a step of a long prompt answers late: only a long silence, or its own word, ends it
      livenessProbe:
        httpGet: {path: /health, port: http}
        periodSeconds: 30
        timeoutSeconds: 30
        failureThreshold: 10
      readinessProbe:
        httpGet: {path: /health, port: http}
        periodSeconds: 10
        timeoutSeconds: 30
        failureThreshold: 6
      {{- end }}
      {{- if gt (int $pool.drain.preStopSeconds) 0 }}
      lifecycle:
        preStop: {sleep: {seconds: {{ int $pool.drain.preStopSeconds }}}}
      {{- end }}
      {{- $resources := deepCopy $pool.resources }}
      {{- if $pool.gpuResource }}
      {{- $_ := set $resources "limits" (merge (dict $pool.gpuResource (toString $gpus)) (default dict $resources.limits)) }}
      {{- $_ := set $resources "requests" (merge (dict $pool.gpuResource (toString $gpus)) (default dict $resources.requests)) }}
      {{- end }}
      resources: {{- toYaml $resources | nindent 8 }}
      securityContext: {{- include "sala.containerSecurity" $root | nindent 8 }}
      volumeMounts:
        - {name: model, mountPath: /model, readOnly: true}
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: {{ $pool.tmpSize | quote }}}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $pool.shmSize | quote }}}
    {{- if eq $model.source "pvc" }}
    - name: model
      persistentVolumeClaim: {claimName: {{ $model.pvc.claimName | quote }}, readOnly: true}
    {{- else if not $model.cache.persistent }}
    - name: model
      emptyDir: {sizeLimit: {{ $model.cache.size | quote }}}
    {{- else if ne .role "single" }}
    - name: model
      ephemeral:
        volumeClaimTemplate:
          spec: {{- include "sala.modelClaim" $model.cache | nindent 12 }}
    {{- end }}
{{- end -}}

{{- define "sala.modelClaim" -}}
accessModes: [ReadWriteOnce]
{{- with .storageClass }}
storageClassName: {{ . | quote }}
{{- end }}
resources: {requests: {storage: {{ .size | quote }}}}
{{- end -}}
