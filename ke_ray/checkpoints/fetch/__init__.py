"""One checkpoint onto this node: transfers, the cache within its budget, leases."""
