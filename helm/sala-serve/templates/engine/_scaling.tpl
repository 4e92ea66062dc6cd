{{/* Up at once, since work waits; down one by one, and not before the longest request could have ended */}}
{{- define "sala.scaling" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  policies:
    - {type: Percent, value: 100, periodSeconds: 60}
    - {type: Pods, value: 2, periodSeconds: 60}
  selectPolicy: Max
scaleDown:
  stabilizationWindowSeconds: {{ int .Values.longestRequestSeconds }}
  policies:
    - {type: Pods, value: 1, periodSeconds: 300}
  selectPolicy: Max
{{- end -}}
