//! Whole files in and out: several chunks at a time.

use super::files::{Failure, FileClient};
use super::threads;
use crate::gfs::messages::{Data, MasterRequest, Status};
use crate::gfs::{DEFAULT_CHUNK_BYTES, FileName, MAX_PIECE_BYTES};
use crate::wire::Refusal;
use crossbeam_channel::{Receiver, Sender, bounded};
use indicatif::{ProgressBar, ProgressStyle};
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How many chunks are written, or pieces read, at once.
const AT_ONCE: usize = 4;

/// Why a file was not moved.
#[derive(Debug)]
pub enum Trouble {
    /// The file system.
    System(Failure),
    /// The local file.
    Local(io::Error),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self::System(failure)
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Local(error)
    }
}

/// How far it is, shown on standard error.
#[derive(Clone, Debug)]
pub struct Bar(ProgressBar);

impl Bar {
    /// A bar for `length` bytes, which is shown or not.
    pub fn new(length: u64, is_shown: bool) -> Self {
        let bar = if is_shown { ProgressBar::new(length) } else { ProgressBar::hidden() };
        let look = "{wide_bar} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} to go";
        if let Ok(style) = ProgressStyle::with_template(look) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(bar)
    }

    /// Takes the bar away.
    pub fn end(&self) {
        self.0.finish_and_clear();
    }
}

/// Copies `length` bytes of a local file into the system. They go to a file of
/// another name first, so nobody ever sees a part of it under `name`.
///
/// # Errors
/// A [`Trouble`]; the file is not there then, unless it says otherwise.
pub fn put(
    new: &dyn Fn() -> FileClient,
    file: &File,
    length: u64,
    name: &FileName,
    chunk_bytes: Option<u64>,
    copies: Option<u8>,
    bar: &Bar,
) -> Result<(), Trouble> {
    let mut client = new();
    let part = FileName::new(&format!("{name}.part-{:016x}", client.name()))
        .map_err(|error| Failure::No(Refusal::invalid(error.to_string())))?;
    // Sooner than after all the work.
    if client.exists(name)? {
        return Err(Failure::No(Refusal::invalid(format!("{name} exists"))).into());
    }
    let create = MasterRequest::Create { name: part.clone(), chunk_bytes, copies };
    let _: Status = client.ask(&create, false)?;
    let moved =
        put_chunks(new, &mut client, file, length, &part, chunk_bytes, bar).and_then(|()| {
            let rename = MasterRequest::Rename { from: part.clone(), to: name.clone() };
            let _: Status = client.ask(&rename, false)?;
            Ok(())
        });
    if moved.is_err() {
        // What is left over goes, if it can be reached.
        let _: Result<Status, Failure> = client.ask(&MasterRequest::Delete { name: part }, true);
    }
    moved
}

fn put_chunks(
    new: &dyn Fn() -> FileClient,
    client: &mut FileClient,
    file: &File,
    length: u64,
    name: &FileName,
    chunk_bytes: Option<u64>,
    bar: &Bar,
) -> Result<(), Trouble> {
    let chunk_bytes = chunk_bytes.unwrap_or(DEFAULT_CHUNK_BYTES);
    let (sender, chunks) = bounded::<usize>(AT_ONCE);
    let file = Arc::new(file.try_clone()?);
    let work = |mut client: FileClient, chunks: Receiver<usize>| {
        let (file, name, bar) = (Arc::clone(&file), name.clone(), bar.clone());
        move || -> Result<(), Trouble> {
            for index in chunks {
                let begin = index as u64 * chunk_bytes;
                let end = length.min(begin + chunk_bytes);
                for at in (begin..end).step_by(MAX_PIECE_BYTES) {
                    let mut piece = vec![0; MAX_PIECE_BYTES.min((end - at) as usize)];
                    file.read_exact_at(&mut piece, at)?;
                    client.write_piece(&name, index, at - begin, &piece)?;
                    bar.0.inc(piece.len() as u64);
                }
            }
            Ok(())
        }
    };
    let workers: Result<Vec<_>, io::Error> =
        (0..AT_ONCE).map(|_| threads::start("put", work(new(), chunks.clone()))).collect();
    let workers = workers?;
    drop(chunks);
    let count = length.div_ceil(chunk_bytes) as usize;
    let mut begun = Ok(());
    for index in 0..count {
        // One after the other: a chunk is made only when the one before it is.
        begun = client.lease(name, index).map(drop);
        if begun.is_err() || sender.send(index).is_err() {
            break;
        }
    }
    drop(sender);
    finish(workers)?;
    Ok(begun?)
}

/// Copies `length` bytes of the file `name` to `local`, which is there when all of
/// it is.
///
/// # Errors
/// A [`Trouble`]; `local` is as it was then.
pub fn get(
    new: &dyn Fn() -> FileClient,
    name: &FileName,
    length: u64,
    local: &Path,
    bar: &Bar,
) -> Result<(), Trouble> {
    let mut part = local.as_os_str().to_owned();
    part.push(format!(".part-{}", std::process::id()));
    let file = File::create(&part)?;
    let mut at = 0;
    let moved = read_all(new, name, length, |piece| {
        file.write_all_at(piece, at)?;
        at += piece.len() as u64;
        bar.0.inc(piece.len() as u64);
        Ok(())
    })
    .and_then(|()| {
        file.set_len(length)?;
        // What is said to be there is there after a loss of power, too.
        file.sync_all()?;
        fs::rename(&part, local)?;
        Ok(sync_folder_of(local)?)
    });
    if moved.is_err() {
        let _ = fs::remove_file(&part);
    }
    moved
}

fn sync_folder_of(local: &Path) -> io::Result<()> {
    let folder = local.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

/// Reads the first `length` bytes of the file `name`, some pieces ahead, and hands the
/// pieces to `take` in their order.
///
/// # Errors
/// A [`Trouble`]; `take` may have been given some of them by then.
pub fn read_all(
    new: &dyn Fn() -> FileClient,
    name: &FileName,
    length: u64,
    mut take: impl FnMut(&[u8]) -> io::Result<()>,
) -> Result<(), Trouble> {
    const PIECE: u64 = MAX_PIECE_BYTES as u64;
    let count = length.div_ceil(PIECE);
    // Each of the workers reads every so many-th piece.
    let work = |mut client: FileClient, first: u64, pieces: Sender<Vec<Data>>| {
        let name = name.clone();
        move || -> Result<(), Trouble> {
            for number in (first..count).step_by(AT_ONCE) {
                let (begin, end) = (number * PIECE, length.min((number + 1) * PIECE));
                let piece = read_piece(&mut client, &name, begin..end)?;
                if pieces.send(piece).is_err() {
                    break;
                }
            }
            Ok(())
        }
    };
    let (mut workers, mut lanes) = (Vec::new(), Vec::new());
    for first in 0..AT_ONCE {
        let (sender, pieces) = bounded(1);
        workers.push(threads::start("read", work(new(), first as u64, sender))?);
        lanes.push(pieces);
    }
    let mut taken = Ok(());
    for lane in (0..count).map(|number| number as usize % AT_ONCE) {
        // A worker that has ended says why.
        let Ok(parts) = lanes[lane].recv() else { break };
        taken = parts.iter().try_for_each(|part| take(part));
        if taken.is_err() {
            break;
        }
    }
    drop(lanes);
    finish(workers)?;
    Ok(taken?)
}

/// Reads all that stands in `range`, in as many parts as it comes in.
fn read_piece(
    client: &mut FileClient,
    name: &FileName,
    range: Range<u64>,
) -> Result<Vec<Data>, Trouble> {
    let (mut at, mut parts) = (range.start, Vec::new());
    while at < range.end {
        let data = client.read(name, at, (range.end - at) as usize)?;
        if data.is_empty() {
            let why = format!("{name} ends at {at}, before its {} bytes", range.end);
            return Err(Failure::Nobody(why).into());
        }
        at += data.len() as u64;
        parts.push(data);
    }
    Ok(parts)
}

fn finish(workers: Vec<std::thread::JoinHandle<Result<(), Trouble>>>) -> Result<(), Trouble> {
    let ended = workers.into_iter().map(|worker| match worker.join() {
        Ok(result) => result,
        Err(_) => Err(Trouble::Local(io::Error::other("a thread has panicked"))),
    });
    // All of them end before the first trouble is told.
    let ended: Vec<_> = ended.collect();
    ended.into_iter().collect()
}
