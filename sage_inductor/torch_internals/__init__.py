"""Every name of torch that is not public API, by the part of torch it belongs to."""
