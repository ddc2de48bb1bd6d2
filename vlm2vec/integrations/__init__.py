"""Our models and benchmarks in the terms of other people's tools, one module or package per tool; nothing else here imports them."""
