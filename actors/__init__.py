"""Where it is computed: the processes that are not the driver."""
