"""DeepSpeed's ZeRO as a strategy: the only place that knows DeepSpeed."""
