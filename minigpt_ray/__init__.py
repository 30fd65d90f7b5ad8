"""What is computed: configuration, models, losses, data, metrics. Imports neither ray, vllm nor deepspeed."""
