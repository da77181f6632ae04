"""Fine-tuning with hierarchical losses."""
