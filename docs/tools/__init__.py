"""What makes the documentation site and its pictures; `mkdocs.yml` names the hooks."""
