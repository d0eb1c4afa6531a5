//! A decoder asks for no more memory than what it was sent warrants, whatever it was sent. An
//! allocator that counts is what tells; it is this program's, so there is one test in it.
#![allow(unsafe_code)] // An allocator can't be written without; it only counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use prost::Message;
use stillpoint_state::codec::{MAX_PARTS, MAX_SECTIONS, Section};
use stillpoint_state::sections::{Console, Irqchip, Vcpu, VirtioMmio, VirtioNet, VirtioVsock};
use stillpoint_state::{Header, Saved, Unclaimed};

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all is the system's allocator's, beside which two numbers are kept.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What reading `bytes` asks for at most, all sections of a kind taken one after the other.
fn asks_for<S: Section>(bytes: &[u8]) -> usize {
    let before = NOW.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    if let Ok(mut state) = Unclaimed::decode(bytes) {
        let _ = state.take::<S>("0");
    }
    MOST.load(Ordering::Relaxed) - before
}

/// A state of one section with this body, as a stranger could write it.
fn state_of(name: &str, body: &[u8]) -> Vec<u8> {
    let mut section = vec![0x0a, u8::try_from(name.len()).expect("short")];
    section.extend(name.bytes());
    section.extend([0x12, 1, b'0', 0x18, 1, 0x22]);
    prost::encoding::encode_varint(body.len() as u64, &mut section);
    section.extend(body);
    let mut framed = Vec::new();
    prost::encoding::encode_varint(section.len() as u64, &mut framed);
    framed.extend(section);
    with_header(&framed, 1)
}

fn with_header(body: &[u8], sections: u32) -> Vec<u8> {
    let header = Header {
        sections,
        body_len: body.len() as u64,
        ..Header::default()
    };
    let header = header.encode_to_vec();
    let mut bytes = stillpoint_state::codec::MAGIC.to_vec();
    bytes.extend(u32::try_from(header.len()).expect("short").to_le_bytes());
    bytes.extend(header);
    bytes.extend(body);
    bytes
}

/// What is asked for beside some times what came: a bounded number of small parts.
const REST: usize = 2 << 20;

fn bounded<S: Section>(what: &str, body: &[u8]) {
    let bytes = state_of(S::NAME, body);
    let asked = asks_for::<S>(&bytes);
    // The section's bytes once, what is made of them once more, and vectors that grow by doubling.
    let most = 4 * bytes.len() + REST;
    assert!(
        asked <= most,
        "{what}: {} bytes ask for {asked}",
        bytes.len()
    );
}

/// So many fields `tag`, each with nothing in it.
fn hollow(tag: u8, count: usize) -> Vec<u8> {
    [tag << 3 | 2, 0].repeat(count)
}

/// One field `tag` that claims to hold `len` bytes, and holds none.
fn claim(tag: u8, len: u64) -> Vec<u8> {
    let mut bytes = vec![tag << 3 | 2];
    prost::encoding::encode_varint(len, &mut bytes);
    bytes
}

#[test]
fn no_state_asks_for_much_more_than_it_has_bytes() {
    for count in [100, MAX_PARTS, MAX_PARTS + 1, 1 << 20, 8 << 20] {
        bounded::<VirtioVsock>("hollow connections", &hollow(3, count));
        bounded::<VirtioVsock>("hollow resets", &hollow(4, count));
        bounded::<VirtioNet>("hollow frames", &hollow(7, count));
        bounded::<VirtioMmio>("hollow queues", &hollow(9, count));
        bounded::<Vcpu>("hollow MSRs", &hollow(9, count));
    }
    for len in [1 << 16, 1 << 30, u64::from(u32::MAX), u64::MAX >> 1] {
        bounded::<Irqchip>("a claim without bytes", &claim(1, len));
        bounded::<Vcpu>("a claim without indices", &claim(12, len));
        bounded::<Vcpu>("a claim without values", &claim(13, len));
    }
    // Numbers of a byte each, which have four in memory.
    let mut packed = claim(12, 200 << 10);
    packed.extend(vec![1; 200 << 10]);
    bounded::<Vcpu>("packed indices", &packed);
    let mut packed = claim(5, 3 << 20);
    packed.extend(vec![1; 3 << 20]);
    let bytes = state_of(Console::NAME, &packed);
    let asked = asks_for::<Console>(&bytes);
    assert!(asked <= 16 * bytes.len() + REST, "packed lags: {asked}");
    // Sections of one byte.
    for count in [MAX_SECTIONS, 1 << 20] {
        let bytes = with_header(&vec![0; count], u32::MAX);
        let asked = asks_for::<Vcpu>(&bytes);
        assert!(asked <= 4 * bytes.len() + REST, "hollow sections: {asked}");
    }
    // A header that claims the most there can be.
    let asked = asks_for::<Vcpu>(&with_header(&[], u32::MAX));
    assert!(asked <= REST, "a hollow header: {asked}");
    // And one that is as it should be.
    let mut saved = Saved::default();
    saved.put("0", &Vcpu::default()).expect("put");
    let asked = asks_for::<Vcpu>(&saved.finish(2, "0.2.0", "x", 0));
    assert!((1..REST).contains(&asked), "nothing was counted: {asked}");
}
