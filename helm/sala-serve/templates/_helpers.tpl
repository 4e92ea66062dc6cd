{{- define "sala.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}{{- end -}}
{{- end -}}
{{- end -}}

{{- define "sala.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "sala.labels" -}}
{{ include "sala.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Of pods: without versions, so that a new chart alone starts nothing anew */}}
{{- define "sala.podLabels" -}}
{{ include "sala.selector" . }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* dict: root, image */}}
{{- define "sala.image" -}}
{{- $tag := default .root.Chart.AppVersion .image.tag -}}
{{- if eq $tag "latest" }}{{ fail (printf "image %s: tag latest is another image tomorrow: name a version" .image.repository) }}{{ end -}}
{{- $registry := default .image.registry .root.Values.global.imageRegistry -}}
{{- with $registry }}{{ . }}/{{ end }}{{ .image.repository }}{{ if .image.digest }}@{{ .image.digest }}{{ else }}:{{ $tag }}{{ end }}
{{- end -}}

{{- define "sala.authSecret" -}}
{{- default (printf "%s-auth" (include "sala.fullname" .)) .Values.auth.existingSecret -}}
{{- end -}}

{{- define "sala.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}{{- default (include "sala.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}{{- default "default" .Values.serviceAccount.name -}}{{- end -}}
{{- end -}}

{{/* dict: root, name */}}
{{- define "sala.priorityClassName" -}}
{{- if .name -}}{{- .name -}}
{{- else if .root.Values.priorityClass.create -}}{{- default (include "sala.fullname" .root) .root.Values.priorityClass.name -}}{{- end -}}
{{- end -}}

{{/* Seconds that a pod gets to end; dict: what, drain, given, longest */}}
{{- define "sala.grace" -}}
{{- $least := add (int .drain.preStopSeconds) (int .longest) (int .drain.marginSeconds) -}}
{{- if kindIs "invalid" .given -}}{{- $least -}}
{{- else if lt (int .given) (int $least) -}}
{{- fail (printf "%s.terminationGracePeriodSeconds: expected at least %d (preStopSeconds %d + longestRequestSeconds %d + marginSeconds %d), got %d" .what (int $least) (int .drain.preStopSeconds) (int .longest) (int .drain.marginSeconds) (int .given)) -}}
{{- else -}}{{- int .given -}}{{- end -}}
{{- end -}}

{{- define "sala.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "sala.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* All pools with their defaults filled in, as JSON: {name: pool} */}}
{{- define "sala.pools" -}}
{{- $pools := dict -}}
{{- range $name, $own := .Values.engine.pools -}}
{{- if not (kindIs "invalid" $own) -}}
{{- $profile := default $.Values.engine.defaults.profile $own.profile -}}
{{- $pool := mergeOverwrite (deepCopy $.Values.engine.defaults) (deepCopy (get $.Values.engine.profiles $profile)) (deepCopy $own) -}}
{{- $_ := set $pool "profile" $profile -}}
{{- $_ := set $pool "servedModelName" (default $name $pool.servedModelName) -}}
{{- $most := int $pool.replicas -}}
{{- if ne $pool.autoscaling.type "none" -}}{{- $most = int $pool.autoscaling.maxReplicas -}}{{- end -}}
{{- $_ := set $pool "mostReplicas" $most -}}
{{- $_ := set $pools $name $pool -}}
{{- end -}}
{{- end -}}
{{- toJson $pools -}}
{{- end -}}

{{/* dict: root, name */}}
{{- define "sala.poolName" -}}
{{- printf "%s-engine-%s" (include "sala.fullname" .root) .name -}}
{{- end -}}

{{/* Everything that values must agree about; rendered once, gives nothing */}}
{{- define "sala.check" -}}
{{- $longest := int .Values.longestRequestSeconds -}}
{{- $pools := include "sala.pools" . | fromJson -}}
{{- if not $pools }}{{ fail "engine.pools: expected one pool at least" }}{{ end -}}
{{- if and (gt (int .Values.gateway.replicas) 1) (eq .Values.redis.mode "none") -}}
{{- fail "gateway.replicas: several gateways need one Redis: set redis.mode to internal or external" -}}{{- end -}}
{{- if and (eq .Values.redis.mode "external") (not .Values.redis.external.existingSecret) -}}
{{- fail "redis.external.existingSecret: expected the Secret with Redis' URL" -}}{{- end -}}
{{- if not .Values.auth.existingSecret -}}
{{- range tuple "adminToken" "serverSecret" -}}
{{- if lt (len (get $.Values.auth.inline .)) 16 }}{{ fail (printf "auth: expected existingSecret, or inline.%s of 16 characters at least" .) }}{{ end -}}
{{- end -}}
{{- if and (eq .Values.redis.mode "internal") (not (regexMatch "^[A-Za-z0-9]{16,}$" .Values.auth.inline.redisPassword)) -}}
{{- fail "auth.inline.redisPassword: expected 16 letters and digits at least" -}}{{- end -}}
{{- end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) }}{{ fail "httpRoute.parentRefs: expected one Gateway at least" }}{{ end -}}
{{- $timeout := int .Values.httpRoute.requestTimeoutSeconds -}}
{{- if and (gt $timeout 0) (lt $timeout $longest) -}}
{{- fail (printf "httpRoute.requestTimeoutSeconds: expected 0 or at least longestRequestSeconds (%d), got %d: longer answers would be cut" $longest $timeout) -}}{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) }}{{ fail "ingress.host: expected a host name" }}{{ end -}}
{{- $deadlines := default dict .Values.gateway.settings.deadlines -}}
{{- range $name, $seconds := $deadlines -}}
{{- if gt (float64 $seconds) (float64 $longest) -}}
{{- fail (printf "gateway.settings.deadlines.%s: expected at most longestRequestSeconds (%d), got %v: a drain would cut such requests" $name $longest $seconds) -}}{{- end -}}
{{- end -}}
{{- $scaled := dict -}}
{{- range $name, $pool := $pools -}}
{{- $what := printf "engine.pools.%s" $name -}}
{{- if gt (len (include "sala.poolName" (dict "root" $ "name" $name))) 58 }}{{ fail (printf "%s: expected a shorter name" $what) }}{{ end -}}
{{- $model := $pool.model -}}
{{- if and (eq $model.source "uri") (not (and $model.uri.url $model.uri.sha256)) }}{{ fail (printf "%s.model.uri: expected url and sha256" $what) }}{{ end -}}
{{- if and (eq $model.source "hub") (not (and $model.hub.repository $model.hub.revision)) }}{{ fail (printf "%s.model.hub: expected repository and revision" $what) }}{{ end -}}
{{- if and (eq $model.source "pvc") (not $model.pvc.claimName) }}{{ fail (printf "%s.model.pvc.claimName: expected a claim" $what) }}{{ end -}}
{{- $nodes := int $pool.multiNode.nodes -}}
{{- if mod (int $pool.tensorParallelSize) $nodes }}{{ fail (printf "%s: tensorParallelSize %d cannot be split evenly over %d nodes" $what (int $pool.tensorParallelSize) $nodes) }}{{ end -}}
{{- if and (gt $nodes 1) (not ($.Capabilities.APIVersions.Has "leaderworkerset.x-k8s.io/v1")) -}}
{{- fail (printf "%s.multiNode: this cluster has no LeaderWorkerSet (leaderworkerset.x-k8s.io/v1)" $what) -}}{{- end -}}
{{- if and (gt $nodes 1) (ne $pool.profile "gpu") }}{{ fail (printf "%s.multiNode: expected profile gpu" $what) }}{{ end -}}
{{- $scaling := $pool.autoscaling -}}
{{- if ne $scaling.type "none" -}}
{{- if gt $nodes 1 }}{{ fail (printf "%s.autoscaling: groups of several nodes are not scaled" $what) }}{{ end -}}
{{- if gt $longest 3600 }}{{ fail (printf "%s.autoscaling: longestRequestSeconds is %d, and scaling down can be held back for 3600 s at most" $what $longest) }}{{ end -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) }}{{ fail (printf "%s.autoscaling: minReplicas is above maxReplicas" $what) }}{{ end -}}
{{- $_ := set $scaled $pool.servedModelName true -}}
{{- end -}}
{{- end -}}
{{- if gt (len $scaled) 1 }}{{ fail "engine.pools: queued tokens are counted for all models together, so that pools of one model only can be scaled by them" }}{{ end -}}
{{- range tuple (tuple "metrics.serviceMonitor" .Values.metrics.serviceMonitor.enabled "monitoring.coreos.com/v1") (tuple "metrics.podMonitor" .Values.metrics.podMonitor.enabled "monitoring.coreos.com/v1") (tuple "metrics.prometheusRule" .Values.metrics.prometheusRule.enabled "monitoring.coreos.com/v1") (tuple "httpRoute" .Values.httpRoute.enabled "gateway.networking.k8s.io/v1") -}}
{{- if and (index . 1) (not ($.Capabilities.APIVersions.Has (index . 2))) }}{{ fail (printf "%s.enabled: this cluster has no %s" (index . 0) (index . 2)) }}{{ end -}}
{{- end -}}
{{- range $name, $pool := $pools -}}
{{- if and (eq $pool.autoscaling.type "keda") (not ($.Capabilities.APIVersions.Has "keda.sh/v1alpha1")) }}{{ fail (printf "engine.pools.%s.autoscaling: this cluster has no KEDA (keda.sh/v1alpha1)" $name) }}{{ end -}}
{{- end -}}
{{- end -}}
