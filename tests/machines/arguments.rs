//! Arguments of the scripts' commands.

use goldenscript::Command;
use std::error::Error;
use std::time::Duration;

/// What a command may fail with.
pub(crate) type Failure = Box<dyn Error>;

/// The positional arguments of `command`.
pub(crate) fn positional(command: &Command) -> Vec<&str> {
    let mut arguments = command.consume_args();
    std::iter::from_fn(|| arguments.next_pos()).collect()
}

/// Exactly `N` positional arguments.
pub(crate) fn exactly<const N: usize>(command: &Command) -> Result<[&str; N], Failure> {
    let found = positional(command);
    let count = found.len();
    found
        .try_into()
        .map_err(|_| format!("{} takes {N} arguments, not {count}", command.name).into())
}

/// The values given for `key`, in their order.
pub(crate) fn given<'a>(command: &'a Command, key: &str) -> Vec<&'a str> {
    let mut arguments = command.consume_args();
    let pairs = std::iter::from_fn(|| arguments.next_key());
    pairs.filter(|(name, _)| *name == key).map(|(_, value)| value).collect()
}

/// The value given for `key`, if any.
pub(crate) fn option<'a>(command: &'a Command, key: &str) -> Option<&'a str> {
    given(command, key).pop()
}

/// A span of time: `5s`, `0.5s`, `200ms`.
pub(crate) fn span(text: &str) -> Result<Duration, Failure> {
    let bad = || format!("{text:?} is no span of time such as 5s or 200ms");
    if let Some(millis) = text.strip_suffix("ms") {
        return Ok(Duration::from_millis(millis.parse().map_err(|_| bad())?));
    }
    let seconds = text.strip_suffix('s').ok_or_else(bad)?;
    Ok(Duration::try_from_secs_f64(seconds.parse().map_err(|_| bad())?)?)
}
