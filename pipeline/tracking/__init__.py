"""What the registry keeps in MLflow: records, versions, verdicts, pages."""
