"""`dlo::GatherActive`: a router's decisions and the active tokens' rows, on a CPU."""
