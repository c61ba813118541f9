"""Real digits, three small trained networks, and a tool that makes a network hard to quantize."""
