"""dlo_artifact.json, the description of an artefact: one schema, written by the exporter and read by everybody."""
