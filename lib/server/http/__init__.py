"""HTTP: errors, middleware, authentication, uploads, logs, metrics and events."""
