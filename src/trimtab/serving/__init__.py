"""The OpenAI-compatible HTTP server: `create_app` makes it of a `Worker` that runs the engines."""
