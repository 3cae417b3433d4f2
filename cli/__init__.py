"""The command line: arguments -> settings -> one library call. The only place that prints and catches errors."""
