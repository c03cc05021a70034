//! A minute of chaos on loopback. `make chaos` is the long run, with namespaces.

#[path = "chaos/mod.rs"]
mod chaos;

use chaos::network::Network;
use chaos::{Settings, run};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

#[test]
fn a_minute_of_kills_and_pauses_leaves_every_key_one_register() {
    let programs = Path::new(env!("CARGO_BIN_EXE_server")).parent().unwrap();
    let report = run(Settings {
        programs: programs.to_owned(),
        network: Network::Loopback { why: "a test".to_owned() },
        span: Duration::from_secs(60),
        seed: 1,
        servers: 5,
        clients: 16,
        interrupted: Arc::new(AtomicBool::new(false)),
    });
    assert!(report.is_fine(), "{report}");
}
