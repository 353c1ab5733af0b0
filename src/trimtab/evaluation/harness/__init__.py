"""What lets lm-evaluation-harness run a plan: its model interface, its settings, its plain command."""
