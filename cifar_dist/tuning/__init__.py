"""Choose hyper-parameters with Optuna: trials are run folders."""
