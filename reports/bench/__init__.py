"""The studies behind `reports/*.md`; run them with `make bench` or `python -m reports.bench NAME`."""
