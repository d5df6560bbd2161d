"""The answers shipped with this package, `<gpu>/<bucket>.json`: data only, installed as `sse_tune._tuning_db`."""
