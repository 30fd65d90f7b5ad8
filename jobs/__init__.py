"""When it is computed: one file is one thing that can be run or submitted as a job."""
