{{/* settings.toml of the gateways: the chart's defaults, then the user's, then what must agree with other objects */}}
{{- define "sala.settings" -}}
{{- $longest := int .Values.longestRequestSeconds -}}
{{- $engines := list -}}
{{- range $name, $pool := include "sala.pools" . | fromJson -}}
{{- $set := include "sala.poolName" (dict "root" $ "name" $name) -}}
{{- range $i := until (int $pool.mostReplicas) -}}
{{- $engines = append $engines (dict "url" (printf "http://%s-%d.%s.%s.svc:8001" $set $i $set $.Release.Namespace) "engine_id" (printf "%s-%d" $name $i) "read_timeout_s" $longest) -}}
{{- end -}}
{{- end -}}
{{- $deadlines := dict -}}
{{- range tuple "queue_s" "first_token_s" "total_s" }}{{ $_ := set $deadlines . $longest }}{{ end -}}
{{- $_ := set $deadlines "between_tokens_s" (min 600 $longest) -}}
{{- $settings := dict "telemetry" (dict "log_format" "json") "deadlines" $deadlines "limits" (dict "local_share" (divf 1 (int .Values.gateway.replicas))) -}}
{{- $settings = mergeOverwrite $settings (deepCopy .Values.gateway.settings) -}}
{{- $fixed := dict "server" (dict "host" "0.0.0.0" "port" 8000 "drain_timeout_s" $longest) "admin" (dict "host" "0.0.0.0" "port" 8002) "engines" $engines -}}
{{- if .Values.gateway.tokenizer.existingClaim -}}
{{- $_ := set $fixed "tokens" (dict "tokenizer" (clean (printf "/model/%s" .Values.gateway.tokenizer.path))) -}}
{{- end -}}
{{- regexReplaceAll "\n *\n" (mergeOverwrite $settings $fixed | toToml) "\n" | trim -}}
{{- end -}}
