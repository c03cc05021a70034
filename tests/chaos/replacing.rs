//! Replacing a viewleader: one command when its disk is gone, or two when it is removed
//! first. The command is given again until it has been done.

use super::process::Program;
use std::net::SocketAddrV4;
use std::path::Path;
use std::process::Command;

/// How long one try may take, in seconds.
const TRY_SECONDS: &str = "5";

/// A viewleader that is being replaced.
pub(crate) struct Replacing {
    /// Its number.
    pub(crate) number: usize,
    stage: Stage,
    client: Option<Program>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Removing,
    Adding,
    Over,
}

impl Replacing {
    pub(crate) fn new(number: usize, is_removed_first: bool) -> Self {
        let stage = if is_removed_first { Stage::Removing } else { Stage::Adding };
        Self { number, stage, client: None }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.stage == Stage::Over
    }

    /// Looks at what has become of the command, and gives the next. Returns whether it has
    /// just been removed: now its disk is to be erased, and another is to start there.
    pub(crate) fn look(
        &mut self,
        programs: &Path,
        viewleaders: &[SocketAddrV4],
        address: SocketAddrV4,
    ) -> bool {
        let mut is_removed = false;
        if self.client.as_mut().is_some_and(Program::has_ended) {
            let finished = self.client.take().unwrap().finish(super::process::PATIENCE);
            let said = finished.stdout;
            let is_done = said.contains(r#""status":"ok""#);
            match self.stage {
                // It may have been removed by the try before.
                Stage::Removing if is_done || said.contains(r#""status":"unknown""#) => {
                    is_removed = true;
                    self.stage = Stage::Adding;
                }
                Stage::Adding if is_done => self.stage = Stage::Over,
                _ => {}
            }
        }
        if self.client.is_none() && !self.is_over() {
            let all: Vec<String> = viewleaders.iter().map(SocketAddrV4::to_string).collect();
            let mut command = Command::new(programs.join("client"));
            command.args(["--timeout", TRY_SECONDS, "--viewleader", &all.join(",")]);
            let word = match self.stage {
                Stage::Removing => "viewleader_remove",
                Stage::Adding | Stage::Over => "viewleader_add",
            };
            self.client = Some(Program::start(word, command.arg(word).arg(address.to_string())));
        }
        is_removed
    }
}
