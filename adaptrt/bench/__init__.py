"""What `adaptrt bench` measures: decode and prefill beside the bandwidth probed in the same run."""
