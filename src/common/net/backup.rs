//! Taking a backup: a walk around the ring, a page at a time, from primary to
//! primary. What it promises is told in [`crate::backup`].

use super::ask::Asker;
use super::call::{self, Caller};
use super::display::Walk;
use crate::backup::folder::{FolderError, Writer};
use crate::backup::{Manifest, ViewleaderState};
use crate::kv::messages::{BackupPage, Place, Public};
use crate::kv::operation::{Conclusion, Event, Question, Verdict, Whom};
use crate::kv::ring::RING_POINTS;
use crate::view::messages::{
    ListedLock, LockList, NumbersAnswer, QueryView, ViewAnswer, ViewRequest,
};
use crate::view::restoring::BackupId;
use crate::view::{Dialect, View};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How soon something is tried again that may go well later.
pub(super) const RETRY: Duration = Duration::from_millis(50);

/// Why a backup is not taken, or a cluster not restored.
#[derive(Debug)]
pub enum Failure {
    /// The user has ended it.
    Interrupted(String),
    /// The folder.
    Folder(FolderError),
    /// The system says no, or what was asked can't be right.
    No(String),
    /// Nobody answers.
    Nobody(String),
}

impl From<FolderError> for Failure {
    fn from(error: FolderError) -> Self {
        Self::Folder(error)
    }
}

impl Failure {
    /// How the command ends that has failed so.
    pub fn into_conclusion(self) -> Conclusion {
        let (verdict, message) = match self {
            Self::Interrupted(message) => (Verdict::Interrupted, message),
            Self::Folder(error) => (Verdict::No, error.to_string()),
            Self::No(message) => (Verdict::No, message),
            Self::Nobody(message) => (Verdict::Nobody, message),
        };
        Conclusion { reply: None, message: Some(message), verdict }
    }
}

/// This moment, in milliseconds since 1970.
pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_millis() as u64
}

/// Whoever takes a backup or restores one asks through this.
pub(super) struct Cluster<'a> {
    pub(super) asker: &'a Asker,
    pub(super) stop: &'a AtomicBool,
    lines: BTreeMap<SocketAddrV4, Caller>,
}

impl<'a> Cluster<'a> {
    pub(super) fn new(asker: &'a Asker, stop: &'a AtomicBool) -> Self {
        Self { asker, stop, lines: BTreeMap::new() }
    }

    /// # Errors
    /// When the user wants to end.
    pub(super) fn go_on(&self, unfinished: &str) -> Result<(), Failure> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(Failure::Interrupted(format!("interrupted: {unfinished}"))),
            false => Ok(()),
        }
    }

    /// Asks the viewleader that leads.
    ///
    /// # Errors
    /// When none answers, or it says no.
    pub(super) fn ask_leader<A: DeserializeOwned>(
        &self,
        request: ViewRequest,
    ) -> Result<A, Failure> {
        let deadline = Instant::now() + self.asker.timeout;
        let body = match self.asker.ask(Whom::Viewleader, &Question::View(request), deadline) {
            Event::Answer { body, .. } => body,
            Event::Silence { closed: true, why, .. } => {
                return Err(Failure::No(format!("{why}: one of the original's knows no backups")));
            }
            Event::Silence { why, .. } => return Err(Failure::Nobody(why)),
            Event::Begin | Event::Waited | Event::Interrupted => {
                unreachable!("an answer, or silence")
            }
        };
        serde_json::from_slice(&body).map_err(|_| match call::refusal(&body) {
            Some(refusal) => Failure::No(refusal.error),
            None => Failure::No(
                "the viewleader's answer is not to be understood: one of the original's knows no \
                 backups"
                    .into(),
            ),
        })
    }

    pub(super) fn view(&self) -> Result<Arc<View>, Failure> {
        let query = ViewRequest::QueryView(QueryView::default());
        Ok(self.ask_leader::<ViewAnswer>(query)?.view)
    }

    /// What is there from `place` on, from whoever is the primary there. Asked again
    /// until the time that a command may take is over.
    ///
    /// # Errors
    /// When nobody serves that place for so long.
    pub(super) fn page(
        &mut self,
        view: &mut Arc<View>,
        place: &Place,
    ) -> Result<BackupPage, Failure> {
        let deadline = Instant::now() + self.asker.timeout;
        loop {
            let why = match view.primary_of(place.from) {
                None => why_nobody(view, place),
                Some(primary) => match self.page_at(primary, place, deadline) {
                    Ok(page) => return Ok(page),
                    Err(why) => format!("{primary}: {why}"),
                },
            };
            if Instant::now() + RETRY >= deadline {
                return Err(Failure::Nobody(why));
            }
            self.go_on("nothing is left of it")?;
            std::thread::sleep(RETRY);
            *view = self.view()?;
        }
    }

    fn page_at(
        &mut self,
        primary: SocketAddrV4,
        place: &Place,
        deadline: Instant,
    ) -> Result<BackupPage, String> {
        // One that is asleep is not waited for until the end: another may take over.
        let patience = deadline.saturating_duration_since(Instant::now()) / 2;
        let deadline = Instant::now() + patience;
        let mut line = match self.lines.remove(&primary) {
            Some(line) => line,
            None => Caller::connect(primary, deadline).map_err(|failure| failure.to_string())?,
        };
        let question = Question::Server(Public::Backup(place.clone()));
        let body = line.call(&question, deadline).map_err(|failure| failure.to_string())?;
        let page = serde_json::from_slice(&body).map_err(|error| match call::refusal(&body) {
            Some(refusal) => refusal.error,
            None => error.to_string(),
        })?;
        self.lines.insert(primary, line);
        Ok(page)
    }

    fn locks(&self) -> Result<Vec<ListedLock>, Failure> {
        #[derive(Deserialize)]
        struct Page {
            locks: Vec<ListedLock>,
            more: bool,
        }
        let mut locks: Vec<ListedLock> = Vec::new();
        loop {
            let after = locks.last().map(|last| last.lock.clone());
            let page: Page = self.ask_leader(ViewRequest::LockList(LockList { after }))?;
            let is_last = !page.more || page.locks.is_empty();
            locks.extend(page.locks);
            if is_last {
                return Ok(locks);
            }
        }
    }
}

fn why_nobody(view: &View, place: &Place) -> String {
    let group = view.group_at(place.from).map(|index| (view.arc(index), &view.groups[index]));
    match group {
        Some((arc, group)) => {
            let held: Vec<_> = group.held_by.iter().map(|it| it.address.to_string()).collect();
            format!(
                "the arc {arc} is lost; it was held last by {}: start one of these again over its \
                 disk",
                held.join(", ")
            )
        }
        None => "there are no servers".into(),
    }
}

/// Who has replicated keys in `view`.
///
/// # Errors
/// When nobody has.
pub(super) fn require_servers(view: &View) -> Result<(), Failure> {
    if view.own_members().next().is_some() {
        return Ok(());
    }
    let are_originals = view.members.iter().any(|member| member.dialect == Dialect::Original);
    Err(Failure::No(if are_originals {
        "all servers are the original's: what they keep can't be backed up or restored".into()
    } else {
        "there are no servers".into()
    }))
}

/// Takes a backup of the cluster into `folder`.
///
/// # Errors
/// See [`Failure`]; nothing is left then.
pub fn take(asker: &Asker, folder: &Path, stop: &AtomicBool) -> Result<Manifest, Failure> {
    let mut cluster = Cluster::new(asker, stop);
    let mut writer = Writer::begin(folder)?;
    let began_ms = now_ms();
    let mut view = cluster.view()?;
    require_servers(&view)?;
    refuse_half_restored(&view)?;
    let bar = Walk::new(u64::from(RING_POINTS), "points of the ring");
    let mut keys = 0;
    let mut place = Some(Place::default());
    while let Some(at) = place {
        cluster.go_on("nothing is left of the backup")?;
        bar.show(at.from.number().into(), keys);
        let page = cluster.page(&mut view, &at)?;
        keys += page.entries.len() as u64;
        writer.append(&page.entries)?;
        if page.next.as_ref().is_some_and(|next| next.from < at.from || *next == at) {
            return Err(Failure::No(format!("a server goes back from point {}", at.from)));
        }
        place = page.next;
    }
    bar.end();
    let NumbersAnswer { numbers, .. } = cluster.ask_leader(ViewRequest::Numbers {})?;
    let (view, locks) = (cluster.view()?, cluster.locks()?);
    refuse_half_restored(&view)?;
    let state = ViewleaderState { numbers, view: &view, locks: &locks };
    writer.write("viewleader.json", &state)?;
    cluster.go_on("nothing is left of the backup")?;
    let manifest = Manifest {
        backup: BackupId::drawn(rand::random()),
        taken_by: format!("ringleader {}", env!("CARGO_PKG_VERSION")),
        began_ms,
        ended_ms: now_ms().max(began_ms),
        numbers,
        keys: 0,
        bytes: 0,
        files: Vec::new(),
    };
    Ok(writer.finish(manifest)?)
}

fn refuse_half_restored(view: &View) -> Result<(), Failure> {
    match &view.restoring {
        None => Ok(()),
        Some(restoration) => Err(Failure::No(format!(
            "the cluster is being restored from the backup {} and holds a part of it: wait until \
             that is done",
            restoration.backup
        ))),
    }
}
