"""Reports people read: one self-contained HTML file of a demo run."""
