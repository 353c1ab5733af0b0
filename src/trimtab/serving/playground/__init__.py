"""The page to try a served model in: static files, no build, nothing from outside."""
