FROM prom/prometheus:v3.5.0
