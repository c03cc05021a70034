//! The machines without their shells: golden scripts.
//!
//! A script of tests/scripts reads as prose, command, output; its file name is a
//! claim. `viewleader/` drives the viewleader alone, `servers/` a small cluster
//! in one thread with a virtual clock ([`ringleader::sim::cluster`]); the commands are listed in
//! [`viewleader_script`] and [`servers_script`]. After a change that is meant,
//! `UPDATE_GOLDENFILES=1 cargo test --test machines` writes the outputs anew,
//! to be read before they are committed. `SCRIPT=part-of-a-name` runs less.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a test may panic, and says which script failed"
)]

#[path = "machines/arguments.rs"]
mod arguments;
#[path = "machines/scripts.rs"]
mod scripts;
#[path = "machines/servers_script.rs"]
mod servers_script;
#[path = "machines/viewleader_script.rs"]
mod viewleader_script;

#[test]
fn the_viewleader_does_what_its_scripts_say() {
    scripts::run::<viewleader_script::ViewleaderScript>("viewleader");
}

#[test]
fn the_servers_do_what_their_scripts_say() {
    scripts::run::<servers_script::ServersScript>("servers");
}
