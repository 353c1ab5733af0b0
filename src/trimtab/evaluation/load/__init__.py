"""Load on a server: arrivals, prompts, a light HTTP client, and what the answers' times come to."""
