"""Other runtimes doing the same work, when they are installed; each one is a file with a `works` function."""
