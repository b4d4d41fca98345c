"""What runs beside the scheduler: quotas, the size of prompts, the banner."""
