//! Calls by XML-RPC, as the programs of the original file system make them.
//!
//! A program that takes such calls has a table of [`Method`]s; here is what they
//! have in common: reading a call, finding its method, counting its arguments,
//! writing the result or the fault, and the three calls about calls
//! (`system.listMethods`, `system.methodHelp`, `system.methodSignature`). The crate
//! `dxr` reads and writes the values.
//!
//! # Values
//! Numbers are `int`, or `i8` beyond 32 bits; nothing is `nil`, as with Python's
//! `allow_none`. What came as text is text again; bytes that XML can't carry
//! unchanged go by `base64`, and either may come wherever data is asked for.
//!
//! # Faults
//! Whatever the original has no text for is a fault. Those about the call itself have
//! the codes of the "Specification for Fault Code Interoperability" (2001), the
//! others say what the caller can do next, as in every refusal of ours: mend it (1),
//! know that it is not there (2), try again (3), find out what has become of it (4).

use crate::gfs::messages::Data;
use crate::wire::{HostPort, Reason, Refusal};
use dxr::{Fault, FaultResponse, MethodCall, MethodResponse, Value};
use quick_xml::events::Event;
use std::fmt;
use std::net::SocketAddrV4;

/// How deep elements stand in each other at most: a call whose argument is a list of
/// lists has half of it.
pub const MAX_DEPTH: usize = 24;

const NOT_XML: i32 = -32700;
const NO_METHOD: i32 = -32601;
const BAD_ARGUMENTS: i32 = -32602;
const INTERNAL: i32 = -32603;

/// What a method comes to.
pub type Outcome = Result<Value, Fault>;

/// One method of the service `S`.
pub struct Method<S> {
    /// What it is called.
    pub name: &'static str,
    /// The type of its result, and of each argument.
    pub signature: &'static [&'static str],
    /// What it does, for people.
    pub help: &'static str,
    /// Does it.
    pub run: fn(&S, Arguments) -> Outcome,
}

/// Carries out the call that is written in `body`; gives what is to be answered.
pub(super) fn answer<S>(service: &S, methods: &[Method<S>], body: &[u8]) -> Vec<u8> {
    let outcome = read_call(body).and_then(|call| {
        let arguments = Arguments { values: call.params.into_iter(), next: 1 };
        carry_out(service, methods, &call.name, arguments)
    });
    write_reply(outcome)
}

/// Says no to a call.
pub(super) fn refuse(refusal: Refusal) -> Vec<u8> {
    write_reply(Err(fault(refusal)))
}

fn write_reply(outcome: Outcome) -> Vec<u8> {
    let written = match outcome {
        Ok(value) => MethodResponse { value }.to_xml(),
        Err(fault) => FaultResponse { fault }.to_xml(),
    };
    let written = written.or_else(|error| {
        let fault = Fault::new(INTERNAL, format!("the result can't be written: {error}"));
        FaultResponse { fault }.to_xml()
    });
    document(&written.unwrap_or_default())
}

/// How a call of `name` is written.
///
/// # Errors
/// When an argument can't be written.
pub(super) fn write_call(name: &str, params: Vec<Value>) -> Result<Vec<u8>, dxr::Error> {
    Ok(document(&MethodCall { name: name.into(), params }.to_xml()?))
}

/// What was answered to a call.
///
/// # Errors
/// The fault that it is, or one that says that it can't be understood.
pub(super) fn read_reply(body: &[u8]) -> Outcome {
    let text = check(body)?;
    match (MethodResponse::from_xml(text), FaultResponse::from_xml(text)) {
        (Ok(reply), _) => Ok(reply.value),
        (_, Ok(reply)) => Err(reply.fault),
        _ => Err(Fault::new(NOT_XML, "this is no answer to a call".into())),
    }
}

fn document(root: &str) -> Vec<u8> {
    format!("<?xml version=\"1.0\"?>\n{root}\n").into_bytes()
}

fn read_call(body: &[u8]) -> Result<MethodCall<'_>, Fault> {
    // The library's own error quotes the whole call.
    MethodCall::from_xml(check(body)?)
        .map_err(|_| Fault::new(NOT_XML, "this is XML, but no methodCall".into()))
}

/// What a reader that descends into elements can read without harm.
fn check(body: &[u8]) -> Result<&str, Fault> {
    let bad = |what: String| Fault::new(NOT_XML, what);
    let text = std::str::from_utf8(body).map_err(|_| bad("a call is in UTF-8".into()))?;
    let mut reader = quick_xml::Reader::from_str(text);
    let mut depth = 0;
    loop {
        match reader.read_event() {
            Ok(Event::Start(_)) if depth >= MAX_DEPTH => {
                return Err(bad(format!("elements stand at most {MAX_DEPTH} deep")));
            }
            Ok(Event::Start(_)) => depth += 1,
            Ok(Event::End(_)) => depth -= 1,
            Ok(Event::DocType(_)) => return Err(bad("a call declares no types".into())),
            Ok(Event::Eof) if depth == 0 => return Ok(text),
            Ok(Event::Eof) => return Err(bad("the XML ends too early".into())),
            Ok(_) => {}
            Err(error) => {
                let at = reader.error_position();
                return Err(bad(format!("this is no XML at byte {at}: {error}")));
            }
        }
    }
}

fn carry_out<S>(
    service: &S,
    methods: &[Method<S>],
    name: &str,
    mut arguments: Arguments,
) -> Outcome {
    let find = |name: &str| {
        let found = methods.iter().find(|method| method.name == name);
        found.ok_or_else(|| {
            let quoted: String = name.chars().take(100).collect();
            Fault::new(NO_METHOD, format!("method {quoted:?} is not supported"))
        })
    };
    match name {
        "system.listMethods" => {
            arguments.count(name, 0)?;
            let own = methods.iter().map(|method| method.name);
            let mut names: Vec<&str> = own.chain(ABOUT_CALLS).collect();
            names.sort_unstable();
            Ok(Value::Array(names.into_iter().map(text).collect()))
        }
        "system.methodHelp" => {
            arguments.count(name, 1)?;
            let about = arguments.text()?;
            let is_system = ABOUT_CALLS.contains(&about.as_str());
            Ok(text(if is_system { "Tells of the methods." } else { find(&about)?.help }))
        }
        "system.methodSignature" => {
            arguments.count(name, 1)?;
            let about = arguments.text()?;
            let signature = match about.as_str() {
                "system.listMethods" => &["array"][..],
                "system.methodHelp" => &["string", "string"],
                "system.methodSignature" => &["array", "string"],
                about => find(about)?.signature,
            };
            let types = signature.iter().map(|it| text(it)).collect();
            Ok(Value::Array(vec![Value::Array(types)]))
        }
        name => {
            let method = find(name)?;
            arguments.count(method.name, method.signature.len() - 1)?;
            (method.run)(service, arguments)
        }
    }
}

const ABOUT_CALLS: [&str; 3] =
    ["system.listMethods", "system.methodHelp", "system.methodSignature"];

/// The arguments of a call, taken one after the other.
pub struct Arguments {
    values: std::vec::IntoIter<Value>,
    /// The how-manieth comes next.
    next: usize,
}

impl Arguments {
    fn count(&self, method: &str, count: usize) -> Result<(), Fault> {
        match self.values.len() {
            given if given == count => Ok(()),
            given => Err(Fault::new(
                BAD_ARGUMENTS,
                format!("{method} takes {count} arguments, not {given}"),
            )),
        }
    }

    fn take<R>(&mut self, kind: &str, read: impl FnOnce(Value) -> Option<R>) -> Result<R, Fault> {
        let number = self.next;
        self.next += 1;
        self.values
            .next()
            .and_then(read)
            .ok_or_else(|| Fault::new(BAD_ARGUMENTS, format!("argument {number} is to be {kind}")))
    }

    /// A text.
    ///
    /// # Errors
    /// A fault when it is something else, here as below.
    pub fn text(&mut self) -> Result<String, Fault> {
        self.take("a string", text_of)
    }

    /// A number that counts something.
    pub fn number(&mut self) -> Result<u64, Fault> {
        self.take("a number from 0 on", number_of)
    }

    /// A moment: seconds since 1970, perhaps with a fraction.
    pub fn seconds(&mut self) -> Result<f64, Fault> {
        self.take("a number of seconds", |value| match value {
            Value::Double(seconds) => Some(seconds),
            value => number_of(value).map(|seconds| seconds as f64),
        })
    }

    /// Yes or no.
    pub fn flag(&mut self) -> Result<bool, Fault> {
        self.take("a boolean", |value| match value {
            Value::Boolean(flag) => Some(flag),
            Value::Nil => Some(false),
            value => number_of(value).map(|number| number != 0),
        })
    }

    /// Text or bytes.
    pub fn data(&mut self) -> Result<Data, Fault> {
        self.take("a string or base64", data_of)
    }

    /// Several pieces of data.
    pub fn pieces(&mut self) -> Result<Vec<Data>, Fault> {
        self.take("an array of strings or base64", |value| list_of(value, data_of))
    }

    /// Addresses, written as the original has them.
    pub fn urls(&mut self) -> Result<Vec<SocketAddrV4>, Fault> {
        let texts = self.take("an array of URLs", |value| list_of(value, text_of))?;
        texts.iter().map(|url| address_of(url)).collect()
    }

    /// An address, written as the original has it.
    pub fn url(&mut self) -> Result<SocketAddrV4, Fault> {
        address_of(&self.text()?)
    }

    /// Pairs of numbers.
    pub fn pairs(&mut self) -> Result<Vec<(u64, u64)>, Fault> {
        self.take("an array of pairs of numbers", |value| {
            list_of(value, |pair| match list_of(pair, number_of)?[..] {
                [first, second] => Some((first, second)),
                _ => None,
            })
        })
    }
}

fn list_of<R>(value: Value, read: impl Fn(Value) -> Option<R>) -> Option<Vec<R>> {
    match value {
        Value::Array(values) => values.into_iter().map(read).collect(),
        _ => None,
    }
}

fn text_of(value: Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text),
        _ => None,
    }
}

pub(super) fn number_of(value: Value) -> Option<u64> {
    match value {
        Value::Integer(number) => number.try_into().ok(),
        Value::Long(number) => number.try_into().ok(),
        _ => None,
    }
}

fn data_of(value: Value) -> Option<Data> {
    match value {
        Value::String(text) => Some(text.into_bytes().into()),
        Value::Base64(bytes) => Some(bytes.into()),
        _ => None,
    }
}

/// The address in `http://HOST:PORT`.
///
/// # Errors
/// A fault that says what is wrong with it.
pub(super) fn address_of(url: &str) -> Result<SocketAddrV4, Fault> {
    let bad = |what: &dyn fmt::Display| {
        let quoted: String = url.chars().take(100).collect();
        Fault::new(BAD_ARGUMENTS, format!("{quoted:?} is no http://HOST:PORT: {what}"))
    };
    let rest = url.strip_prefix("http://").ok_or_else(|| bad(&"it begins otherwise"))?;
    let host = rest.trim_end_matches("/RPC2").trim_end_matches('/');
    let host: HostPort = host.parse().map_err(|error| bad(&error))?;
    let range = match host.port {
        Some(first) => crate::wire::address::PortRange { first, count: 1 },
        None => return Err(bad(&"it has no port")),
    };
    let found = super::call::addresses(&[host], range).map_err(|error| bad(&error))?;
    found.first().copied().ok_or_else(|| bad(&"nobody is called so"))
}

/// An address as the original has it.
pub(super) fn url(address: SocketAddrV4) -> Value {
    Value::String(format!("http://{address}"))
}

/// A text.
pub(super) fn text(text: &str) -> Value {
    Value::String(text.to_owned())
}

/// A number.
pub(super) fn number(number: u64) -> Value {
    match i32::try_from(number) {
        Ok(number) => Value::Integer(number),
        Err(_) => Value::Long(number.try_into().unwrap_or(i64::MAX)),
    }
}

/// Data: as text, if it comes out of XML as it went in.
pub(super) fn data(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) if text.chars().all(is_carried) => Value::String(text.to_owned()),
        _ => Value::Base64(bytes.to_vec()),
    }
}

/// Whether XML 1.0 carries this character unchanged.
fn is_carried(letter: char) -> bool {
    !(letter.is_control() || matches!(letter, '\u{fffe}' | '\u{ffff}')) || "\t\n".contains(letter)
}

/// The fault that says what a refusal does.
pub(super) fn fault(refusal: Refusal) -> Fault {
    let code = match refusal.reason {
        Reason::Invalid => 1,
        Reason::NotFound => 2,
        Reason::Unavailable | Reason::Conflict | Reason::Fenced => 3,
        Reason::UnknownOutcome => 4,
    };
    Fault::new(code, refusal.error)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Adder;

    const METHODS: [Method<Adder>; 1] = [Method {
        name: "add",
        signature: &["int", "int", "int"],
        help: "Adds.",
        run: |_, mut arguments| Ok(number(arguments.number()? + arguments.number()?)),
    }];

    fn ask(body: &str) -> Outcome {
        read_reply(&answer(&Adder, &METHODS, body.as_bytes()))
    }

    fn call(name: &str, arguments: Vec<Value>) -> Outcome {
        ask(std::str::from_utf8(&write_call(name, arguments).unwrap()).unwrap())
    }

    fn code(outcome: Outcome) -> i32 {
        outcome.unwrap_err().code()
    }

    #[test]
    fn a_call_is_carried_out() {
        assert_eq!(call("add", vec![number(2), number(3)]), Ok(Value::Integer(5)));
        let large = call("add", vec![number(1 << 40), number(1)]);
        assert_eq!(large, Ok(Value::Long((1 << 40) + 1)));
    }

    #[test]
    fn the_methods_tell_of_themselves() {
        let Ok(Value::Array(names)) = call("system.listMethods", vec![]) else { panic!() };
        assert_eq!(names.len(), 4);
        assert_eq!(call("system.methodHelp", vec![text("add")]), Ok(text("Adds.")));
        let signature = call("system.methodSignature", vec![text("add")]);
        let types = Value::Array(vec![text("int"), text("int"), text("int")]);
        assert_eq!(signature, Ok(Value::Array(vec![types])));
        assert_eq!(code(call("system.methodHelp", vec![text("fly")])), NO_METHOD);
    }

    #[test]
    fn what_is_no_call_is_a_fault() {
        assert_eq!(code(call("fly", vec![])), NO_METHOD);
        assert_eq!(code(call("add", vec![number(1)])), BAD_ARGUMENTS);
        assert_eq!(code(call("add", vec![text("a"), number(1)])), BAD_ARGUMENTS);
        assert_eq!(code(call("add", vec![Value::Integer(-1), number(1)])), BAD_ARGUMENTS);
        for body in ["", "{}", "<a>", "<a></b>", "<methodCall/>", "\0", "<a>&bomb;</a>", "<!a"] {
            assert_eq!(code(ask(body)), NOT_XML, "{body}");
        }
        let declared = "<!DOCTYPE a [<!ENTITY b 'c'>]><methodCall/>";
        assert_eq!(code(ask(declared)), NOT_XML);
        assert_eq!(code(read_reply(&answer(&Adder, &METHODS, b"\xff"))), NOT_XML);
    }

    #[test]
    fn elements_in_elements_end_before_the_stack_does() {
        let deep = "<value><array><data>".repeat(100_000);
        let body = format!("<methodCall><methodName>add</methodName><params><param>{deep}");
        assert_eq!(code(ask(&body)), NOT_XML);
        // As deep as it may be, on the small stack of a connection.
        let (open, close) = ("<value><array><data>", "</data></array></value>");
        let nested = format!("{}{}", open.repeat(6), close.repeat(6));
        let body = format!(
            "<methodCall><methodName>add</methodName><params><param>{nested}</param>\
             </params></methodCall>"
        );
        let small = crate::net::threads::start("small", move || code(ask(&body))).unwrap();
        assert_eq!(small.join().unwrap(), BAD_ARGUMENTS);
    }

    #[test]
    fn data_comes_out_as_it_went_in() {
        let back = |bytes: &[u8]| {
            let body = write_call("x", vec![data(bytes)]).unwrap();
            let mut params = read_call(&body).unwrap().params;
            data_of(params.remove(0)).unwrap().to_vec()
        };
        for bytes in [
            &b""[..],
            b"plain",
            b"  spaces \n\t",
            b"<&>]]>\"'",
            "ü \u{1f600}".as_bytes(),
            b"a\r\nb\rc",
            b"\0\x01\xff",
            "\u{fffe}".as_bytes(),
            b"&#13;&amp;",
        ] {
            assert_eq!(back(bytes), bytes, "{}", bytes.escape_ascii());
        }
        assert!(matches!(data(b"text"), Value::String(_)));
        assert!(matches!(data(b"\0"), Value::Base64(_)));
    }

    #[test]
    fn a_url_is_an_address() {
        let address = |url: &str| address_of(url).map(|it| it.to_string()).ok();
        assert_eq!(address("http://127.0.0.1:9001").as_deref(), Some("127.0.0.1:9001"));
        assert_eq!(address("http://127.0.0.1:9001/RPC2").as_deref(), Some("127.0.0.1:9001"));
        assert_eq!(address("127.0.0.1:9001"), None);
        assert_eq!(address("http://127.0.0.1"), None);
        assert_eq!(address("file:///etc/passwd"), None);
    }
}
