"""Plans: from the manifests of both sides to which bytes go from whom to whom. Pure."""
