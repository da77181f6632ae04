"""From stored numbers to reports and pages."""
