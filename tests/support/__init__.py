"""What several test files share: honest traces, mistakes planted in copies of them, made-up results, a browser."""
