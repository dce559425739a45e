"""The command `dsco`: recipes by name, and what their options are, told before anything heavy is imported."""
