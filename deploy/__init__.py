"""Running the service elsewhere: proxy, dashboards, manifests; the image without an engine."""
