"""BlockScheduler in training loops and loggers of others: a module a library, and `metrics`."""
