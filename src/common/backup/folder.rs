//! A backup's folder: written, or checked and read.

use super::{FORMAT, FileSum, Manifest};
use crate::kv::Entry;
use crate::wire::MAX_FRAME_BYTES;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::fs::{self, File, TryLockError};
use std::io::{self, BufRead, BufReader, BufWriter, ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A file of keys is ended when it has grown to this.
const FILE_BYTES: u64 = 64 * 1024 * 1024;

/// The file that says that a backup is whole.
const MANIFEST: &str = "manifest.json";

/// The file that whoever writes a backup holds locked.
const LOCK: &str = "lock";

/// The longest manifest, in bytes: that of a million files.
const MAX_MANIFEST_BYTES: u64 = 128 * 1024 * 1024;

/// The longest line, in bytes: what comes in a message can be written in one.
const MAX_LINE_BYTES: u64 = MAX_FRAME_BYTES as u64;

/// Why a backup can't be written or read.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// Something of that name is there.
    #[error("{} is there already: a backup is never written over anything; choose another name", .0.display())]
    Exists(PathBuf),
    /// Another process writes there.
    #[error("another backup is being written to {}: wait for it, or choose another name", .0.display())]
    InUse(PathBuf),
    /// The path has no last part.
    #[error("{} can't be the name of a backup", .0.display())]
    NoName(PathBuf),
    /// The disk is full.
    #[error("there is no room for {}: {error}; make room, or choose another disk", path.display())]
    NoRoom {
        /// What was to be written.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The system says no.
    #[error("{}: {error}", path.display())]
    Io {
        /// What was to be written or read.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// There is no manifest.
    #[error(
        "{} is no whole backup: it has no {MANIFEST}, which is written last; one that was cut \
         short can't be restored", .0.display()
    )]
    NotWhole(PathBuf),
    /// Another program wrote it.
    #[error(
        "{} is of format {format} and this program reads format {FORMAT}: restore it with a \
         program of the version that took it", path.display()
    )]
    OtherFormat {
        /// The backup.
        path: PathBuf,
        /// Its format.
        format: u32,
    },
    /// It is not as it was written.
    #[error("{} is damaged: {what}; restore another backup", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

fn explain(path: &Path, error: io::Error) -> FolderError {
    let path = path.to_owned();
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            FolderError::NoRoom { path, error }
        }
        _ => FolderError::Io { path, error },
    }
}

fn damaged(path: &Path, what: impl Into<String>) -> FolderError {
    FolderError::Damaged { path: path.to_owned(), what: what.into() }
}

/// The manifest as it is in its file, with its own checksum.
#[derive(Serialize, Deserialize)]
struct Sealed {
    format: u32,
    crc32c: u32,
    manifest: Box<RawValue>,
}

/// A file that is being written.
struct Growing {
    file: BufWriter<File>,
    sum: FileSum,
}

/// A backup that is being written. Dropped before [`Writer::finish`], it is
/// removed.
pub struct Writer {
    folder: PathBuf,
    partial: PathBuf,
    _lock: File,
    growing: Option<Growing>,
    done: Vec<FileSum>,
    bytes: u64,
    is_finished: bool,
}

impl Writer {
    /// Begins a backup that is to be called `folder`. What a backup to the same name has
    /// left that was killed is removed.
    ///
    /// # Errors
    /// When something of that name is there, or it can't be written.
    pub fn begin(folder: &Path) -> Result<Self, FolderError> {
        let name = folder.file_name().ok_or_else(|| FolderError::NoName(folder.to_owned()))?;
        let mut partial = name.to_owned();
        partial.push(".partial");
        let partial = folder.with_file_name(partial);
        refuse_existing(folder)?;
        fs::create_dir_all(&partial).map_err(|error| explain(&partial, error))?;
        let at = partial.join(LOCK);
        let lock = match File::create(&at) {
            Ok(lock) => lock,
            // Another one has just become whole, or was given up.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(FolderError::InUse(folder.to_owned()));
            }
            Err(error) => return Err(explain(&at, error)),
        };
        match lock.try_lock() {
            // One that went with its folder meanwhile keeps nobody out.
            Ok(()) if is_at(&lock, &at).map_err(|error| explain(&at, error))? => {}
            Ok(()) | Err(TryLockError::WouldBlock) => {
                return Err(FolderError::InUse(folder.to_owned()));
            }
            Err(TryLockError::Error(error)) => return Err(explain(&at, error)),
        }
        remove_all_but_lock(&partial)?;
        let (growing, done) = (None, Vec::new());
        let folder = folder.to_owned();
        Ok(Self { folder, partial, _lock: lock, growing, done, bytes: 0, is_finished: false })
    }

    /// Writes these keys behind those before.
    ///
    /// # Errors
    /// When they can't be written.
    pub fn append(&mut self, entries: &[Entry]) -> Result<(), FolderError> {
        for entry in entries {
            if self.growing.is_none() {
                let number = self.done.len() + 1;
                self.growing = Some(self.create(format!("keys-{number:05}.jsonl"))?);
            }
            let Some(growing) = &mut self.growing else { continue };
            let path = self.partial.join(&growing.sum.name);
            let mut line = json(entry);
            line.push(b'\n');
            growing.write(&line).map_err(|error| explain(&path, error))?;
            growing.sum.keys += 1;
            self.bytes += entry.bytes() as u64;
            if growing.sum.bytes >= FILE_BYTES {
                self.end_file()?;
            }
        }
        Ok(())
    }

    /// Writes a file of its own.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn write(&mut self, name: &str, value: &impl Serialize) -> Result<(), FolderError> {
        self.end_file()?;
        let mut growing = self.create(name.to_owned())?;
        let path = self.partial.join(name);
        growing.write(&pretty(value)).map_err(|error| explain(&path, error))?;
        self.growing = Some(growing);
        self.end_file()
    }

    fn create(&self, name: String) -> Result<Growing, FolderError> {
        let path = self.partial.join(&name);
        let file = File::create_new(&path).map_err(|error| explain(&path, error))?;
        let sum = FileSum { name, bytes: 0, crc32c: 0, keys: 0 };
        Ok(Growing { file: BufWriter::new(file), sum })
    }

    fn end_file(&mut self) -> Result<(), FolderError> {
        let Some(Growing { file, sum }) = self.growing.take() else { return Ok(()) };
        let path = self.partial.join(&sum.name);
        let file = file.into_inner().map_err(|error| explain(&path, error.into_error()))?;
        file.sync_all().map_err(|error| explain(&path, error))?;
        self.done.push(sum);
        Ok(())
    }

    /// Makes it whole: writes the manifest, of which the figures that are known here are
    /// filled in, and gives the folder its name.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn finish(mut self, manifest: Manifest) -> Result<Manifest, FolderError> {
        self.end_file()?;
        let files = std::mem::take(&mut self.done);
        let keys = files.iter().map(|file| file.keys).sum();
        let manifest = Manifest { files, keys, bytes: self.bytes, ..manifest };
        let at = self.partial.join(MANIFEST);
        let mut file = File::create_new(&at).map_err(|error| explain(&at, error))?;
        let written = file.write_all(&seal(&manifest)).and_then(|()| file.sync_all());
        written.map_err(|error| explain(&at, error))?;
        sync_folder(&self.partial)?;
        // An empty folder could be renamed over.
        refuse_existing(&self.folder)?;
        // The lock goes along, and only then away: without it another backup of this
        // name would take the files for left over.
        fs::rename(&self.partial, &self.folder).map_err(|error| explain(&self.folder, error))?;
        self.is_finished = true;
        let lock = self.folder.join(LOCK);
        fs::remove_file(&lock).map_err(|error| explain(&lock, error))?;
        sync_folder(&self.folder)?;
        sync_folder(match self.folder.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        })?;
        Ok(manifest)
    }
}

impl Growing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.sum.bytes += bytes.len() as u64;
        self.sum.crc32c = crc32c::crc32c_append(self.sum.crc32c, bytes);
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.is_finished {
            // What stays is called partial, and has no manifest. The lock goes last:
            // who has a new one may have begun, and the folder stays.
            let _ = remove_all_but_lock(&self.partial)
                .and_then(|()| remove(&self.partial.join(LOCK)))
                .map(|()| fs::remove_dir(&self.partial));
        }
    }
}

/// Removes what is in the folder `partial`, whose lock is held.
fn remove_all_but_lock(partial: &Path) -> Result<(), FolderError> {
    let lock = partial.join(LOCK);
    let left = fs::read_dir(partial).map_err(|error| explain(partial, error))?;
    for file in left {
        let path = file.map_err(|error| explain(partial, error))?.path();
        if path != lock {
            remove(&path)?;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> Result<(), FolderError> {
    fs::remove_file(path).map_err(|error| explain(path, error))
}

/// Whether `file` is the one that is called `path` now.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let own = file.metadata()?;
    match fs::metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (own.dev(), own.ino())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn refuse_existing(folder: &Path) -> Result<(), FolderError> {
    match fs::symlink_metadata(folder) {
        Ok(_) => Err(FolderError::Exists(folder.to_owned())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(explain(folder, error)),
    }
}

fn sync_folder(folder: &Path) -> Result<(), FolderError> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(|error| explain(folder, error))
}

fn seal(manifest: &Manifest) -> Vec<u8> {
    #[expect(clippy::expect_used, reason = "a manifest of ours that is no JSON is a bug")]
    let manifest = serde_json::value::to_raw_value(manifest).expect("a manifest is JSON");
    let crc32c = crc32c::crc32c(manifest.get().as_bytes());
    json(&Sealed { format: FORMAT, crc32c, manifest })
}

fn json(value: &impl Serialize) -> Vec<u8> {
    #[expect(clippy::expect_used, reason = "a record of ours that is no JSON is a bug")]
    serde_json::to_vec(value).expect("what a backup holds is JSON")
}

fn pretty(value: &impl Serialize) -> Vec<u8> {
    #[expect(clippy::expect_used, reason = "a record of ours that is no JSON is a bug")]
    let mut bytes = serde_json::to_vec_pretty(value).expect("what a backup holds is JSON");
    bytes.push(b'\n');
    bytes
}

/// A whole backup.
#[derive(Debug)]
pub struct Backup {
    folder: PathBuf,
    /// What it is.
    pub manifest: Manifest,
}

impl Backup {
    /// Opens the backup in `folder` and checks its manifest, and that its files are
    /// there; not yet what is in them.
    ///
    /// # Errors
    /// When it is no whole backup, of another format, or damaged.
    pub fn open(folder: &Path) -> Result<Self, FolderError> {
        let path = folder.join(MANIFEST);
        let mut bytes = Vec::new();
        let read = File::open(&path)
            .and_then(|file| file.take(MAX_MANIFEST_BYTES).read_to_end(&mut bytes));
        match read {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound && folder.is_dir() => {
                return Err(FolderError::NotWhole(folder.to_owned()));
            }
            Err(error) => return Err(explain(&path, error)),
        }
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        let no_json = |error: serde_json::Error| damaged(&path, error.to_string());
        let Head { format } = serde_json::from_slice(&bytes).map_err(no_json)?;
        if format != FORMAT {
            return Err(FolderError::OtherFormat { path: folder.to_owned(), format });
        }
        let sealed: Sealed = serde_json::from_slice(&bytes).map_err(no_json)?;
        if crc32c::crc32c(sealed.manifest.get().as_bytes()) != sealed.crc32c {
            return Err(damaged(&path, "its checksum is wrong"));
        }
        let manifest: Manifest = serde_json::from_str(sealed.manifest.get()).map_err(no_json)?;
        for FileSum { name, bytes, .. } in &manifest.files {
            if name.contains('/') {
                return Err(damaged(&path, format!("{name} is no file of a backup")));
            }
            let path = folder.join(name);
            let length = fs::metadata(&path).map_err(|error| explain(&path, error))?.len();
            if length != *bytes {
                let what = format!("it has {length} bytes instead of {bytes}");
                return Err(damaged(&path, what));
            }
        }
        Ok(Self { folder: folder.to_owned(), manifest })
    }

    /// Every key, file by file. Where a file is not as it was written the last one is
    /// an error, and at the latest where it ends.
    pub fn entries(&self) -> impl Iterator<Item = Result<Entry, FolderError>> {
        self.manifest.files.iter().flat_map(|sum| Lines::open(&self.folder, sum))
    }
}

/// The lines of a file.
struct Lines<'a> {
    path: PathBuf,
    sum: &'a FileSum,
    file: Option<BufReader<File>>,
    failure: Option<FolderError>,
    crc32c: u32,
    keys: u64,
    line: Vec<u8>,
}

impl<'a> Lines<'a> {
    fn open(folder: &Path, sum: &'a FileSum) -> Self {
        let path = folder.join(&sum.name);
        let (file, failure) = match File::open(&path) {
            Ok(file) => (Some(BufReader::new(file)), None),
            Err(error) => (None, Some(explain(&path, error))),
        };
        Self { path, sum, file, failure, crc32c: 0, keys: 0, line: Vec::new() }
    }

    /// The next key; nothing where the file ends, as it should.
    fn read(&mut self) -> Result<Option<Entry>, FolderError> {
        let Some(file) = &mut self.file else { return Ok(None) };
        let has_keys = self.sum.keys > 0;
        loop {
            self.line.clear();
            let count = file.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut self.line);
            let count = count.map_err(|error| explain(&self.path, error))?;
            self.crc32c = crc32c::crc32c_append(self.crc32c, &self.line);
            if count == 0 {
                return match (self.crc32c == self.sum.crc32c, self.keys == self.sum.keys) {
                    (true, true) => Ok(None),
                    (false, _) => Err(damaged(&self.path, "its checksum is wrong")),
                    (true, false) => Err(damaged(&self.path, "keys are missing")),
                };
            }
            if has_keys {
                self.keys += 1;
                let entry = serde_json::from_slice(&self.line);
                let number = self.keys;
                return entry
                    .map(Some)
                    .map_err(|error| damaged(&self.path, format!("line {number}: {error}")));
            }
        }
    }
}

impl Iterator for Lines<'_> {
    type Item = Result<Entry, FolderError>;

    fn next(&mut self) -> Option<Self::Item> {
        let read = match self.failure.take() {
            Some(failure) => Err(failure),
            None => self.read(),
        };
        if !matches!(read, Ok(Some(_))) {
            self.file = None;
        }
        read.transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::Version;
    use crate::kv::content::Content;
    use crate::view::restoring::{BackupId, Numbers};

    fn entry(number: u64) -> Entry {
        let version = Version { number, ..Version::default() };
        Entry { key: format!("key {number}").into(), version, content: Content::of("v\n\"".into()) }
    }

    fn blank() -> Manifest {
        Manifest {
            backup: BackupId::drawn(7),
            taken_by: "a test".into(),
            began_ms: 1,
            ended_ms: 2,
            numbers: Numbers::default(),
            keys: 0,
            bytes: 0,
            files: Vec::new(),
        }
    }

    fn write(folder: &Path, count: u64) -> Manifest {
        let mut writer = Writer::begin(folder).unwrap();
        writer.append(&(1..=count).map(entry).collect::<Vec<_>>()).unwrap();
        writer.write("viewleader.json", &"a state").unwrap();
        writer.finish(blank()).unwrap()
    }

    fn read(folder: &Path) -> Result<Vec<Entry>, FolderError> {
        Backup::open(folder)?.entries().collect()
    }

    #[test]
    fn what_was_written_is_read() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("backup");
        let manifest = write(&folder, 100);
        assert_eq!((manifest.keys, manifest.files.len()), (100, 2));
        assert_eq!(read(&folder).unwrap(), (1..=100).map(entry).collect::<Vec<_>>());
        let there: Vec<_> = fs::read_dir(place.path()).unwrap().collect();
        assert_eq!(there.len(), 1, "nothing partial is left: {there:?}");
    }

    #[test]
    fn a_flipped_bit_anywhere_is_found() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("backup");
        write(&folder, 5);
        for file in fs::read_dir(&folder).unwrap() {
            let path = file.unwrap().path();
            let good = fs::read(&path).unwrap();
            for place in 0..good.len() {
                let mut bad = good.clone();
                bad[place] ^= 1;
                fs::write(&path, &bad).unwrap();
                let error = read(&folder).unwrap_err().to_string();
                assert!(error.contains("damaged") || error.contains("format"), "{place}: {error}");
                fs::write(&path, &bad[..place]).unwrap();
                assert!(read(&folder).is_err(), "cut at {place}");
            }
            fs::write(&path, good).unwrap();
        }
        assert!(read(&folder).is_ok());
    }

    #[test]
    fn what_was_cut_short_is_no_backup_and_gives_way_to_the_next() {
        let place = tempfile::tempdir().unwrap();
        let (folder, partial) = (place.path().join("b"), place.path().join("b.partial"));
        let mut writer = Writer::begin(&folder).unwrap();
        writer.append(&[entry(1)]).unwrap();
        assert!(matches!(Writer::begin(&folder), Err(FolderError::InUse(_))));
        // Killed: it is not dropped in order, and its lock goes with it.
        writer.growing = None;
        writer.is_finished = true;
        drop(writer);
        assert!(matches!(read(&partial), Err(FolderError::NotWhole(_))));
        write(&folder, 3);
        assert_eq!(read(&folder).unwrap().len(), 3);
        assert!(!partial.exists());
    }

    #[test]
    fn a_backup_that_is_whole_was_not_touched_by_another_one_of_its_name() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let place = tempfile::tempdir().unwrap();
        for number in 0..50 {
            let folder = place.path().join(number.to_string());
            let mut writer = Writer::begin(&folder).unwrap();
            writer.append(&[entry(1), entry(2)]).unwrap();
            let is_over = AtomicBool::new(false);
            let finished = std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !is_over.load(Ordering::Relaxed) {
                        drop(Writer::begin(&folder));
                    }
                });
                let finished = writer.finish(blank());
                is_over.store(true, Ordering::Relaxed);
                finished
            });
            finished.unwrap();
            assert_eq!(read(&folder).unwrap().len(), 2, "backup {number}");
        }
    }

    #[test]
    fn a_lock_that_was_moved_away_meanwhile_is_not_taken() {
        let place = tempfile::tempdir().unwrap();
        let (here, there) = (place.path().join("here"), place.path().join("there"));
        let lock = File::create(&here).unwrap();
        assert!(is_at(&lock, &here).unwrap());
        fs::rename(&here, &there).unwrap();
        assert!(!is_at(&lock, &here).unwrap());
        File::create(&here).unwrap();
        assert!(!is_at(&lock, &here).unwrap());
    }

    #[test]
    fn one_that_is_given_up_leaves_nothing() {
        let place = tempfile::tempdir().unwrap();
        let mut writer = Writer::begin(&place.path().join("b")).unwrap();
        writer.append(&[entry(1)]).unwrap();
        drop(writer);
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
    }

    #[test]
    fn nothing_is_written_over() {
        let place = tempfile::tempdir().unwrap();
        assert!(matches!(Writer::begin(place.path()), Err(FolderError::Exists(_))));
    }

    #[test]
    fn another_format_is_refused_by_its_number() {
        let place = tempfile::tempdir().unwrap();
        let later = br#"{"format":2,"anything":"else"}"#;
        fs::write(place.path().join(MANIFEST), later).unwrap();
        assert!(matches!(read(place.path()), Err(FolderError::OtherFormat { format: 2, .. })));
    }
}
