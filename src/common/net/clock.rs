//! The clock that machines are told the time of.

use crate::machine::Time;
use std::time::Duration;

/// A monotonic clock; its origin is the moment it was made. It goes on while the machine
/// is suspended, as the leases do that others have given to it.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Duration);

impl Default for Clock {
    fn default() -> Self {
        Self(reading())
    }
}

impl Clock {
    /// The time now.
    pub fn now(self) -> Time {
        Time::from_micros(reading().saturating_sub(self.0).as_micros() as u64)
    }
}

/// [`std::time::Instant`] stands still on Linux while the machine is suspended. This
/// clock costs the same: neither is a system call.
#[cfg(target_os = "linux")]
fn reading() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

#[cfg(not(target_os = "linux"))]
fn reading() -> Duration {
    use std::sync::LazyLock;
    use std::time::Instant;
    static ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
    ORIGIN.elapsed()
}
