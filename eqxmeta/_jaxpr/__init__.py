"""The only place that reads or rewrites jaxprs."""
