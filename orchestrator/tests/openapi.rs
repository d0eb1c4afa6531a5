//! The committed OpenAPI document is the one the daemon serves.

#[test]
fn the_committed_document_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
    let committed = std::fs::read_to_string(path).expect("orchestrator/openapi.json");
    let current = orchestrator::api::openapi_json().expect("document");
    assert!(
        committed == current,
        "run: cargo run -p stillpoint --bin stillpointd -- --print-openapi > {path}"
    );
}

/// What guests find is described too.
#[test]
fn the_guests_document_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/guest-openapi.json");
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    let current = orchestrator::metadata::described::openapi_json().expect("document");
    assert!(committed == current, "run: make openapi");
}
