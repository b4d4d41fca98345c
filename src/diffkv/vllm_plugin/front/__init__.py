"""What runs in the API process, and offline: options from outside, requests in, answers out."""
