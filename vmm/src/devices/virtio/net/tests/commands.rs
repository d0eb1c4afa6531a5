//! The control queue, and several pairs of queues.

use super::*;
use crate::devices::virtio::driver::EVENT_IDX;

const CTRL_OFFLOADS: u64 = 1 << 2;
const CTRL_MAC: u64 = 1 << 23;
const QUEUES: u64 = 1 << 22;
const GUEST_CSUM: u64 = 1 << 1;

/// A tap as [`ONE_TAP`], with several queues.
const SEVERAL: &str = "
    ip tuntap add dev t0 mode tap multi_queue
    ip link set t0 address 02:00:00:00:00:01
    ip addr add 10.77.0.1/24 dev t0
    ip link set t0 up
    ip neigh add 10.77.0.2 lladdr 02:00:00:00:00:02 dev t0 nud permanent";

/// Gives a command; whether the device obeyed.
pub(super) fn command(driver: &Driver, ring: &mut Ring, class: u8, code: u8, rest: &[u8]) -> bool {
    let at = 40 << 20;
    let mut bytes = vec![class, code];
    bytes.extend(rest);
    let put = |bytes: &[u8], at| driver.memory.write_slice(bytes, GuestAddress(at));
    put(&bytes, at).expect("in RAM");
    let answer = at + 0x1000;
    put(&[0xff], answer).expect("in RAM");
    let request = [buffer(at, 2), buffer(at + 2, rest.len() as u32)];
    let parts = if rest.is_empty() { 1 } else { 2 };
    ring.add(&request[..parts], &[buffer(answer, 1)]);
    ring.kick();
    assert_eq!(ring.wait().len, 1);
    let answer: u8 = driver
        .memory
        .read_obj(GuestAddress(answer))
        .expect("in RAM");
    assert!(answer < 2, "no answer");
    answer == 0
}

#[test]
fn the_address_is_the_drivers_until_a_reset() {
    own_network!("the_address_is_the_drivers_until_a_reset", ONE_TAP);
    let mut driver = boot("t0", 1);
    let (.., mut ring) = card(&driver, COMMANDS | CTRL_MAC);
    let other = [0x02, 9, 9, 9, 9, 9];
    assert!(command(&driver, &mut ring, 1, 1, &other));
    assert_eq!(driver.config(0, 6), other);
    driver = swap(driver);
    assert_eq!(driver.config(0, 6), other);
    assert!(
        !command(&driver, &mut ring, 1, 1, &[0x01, 0, 0, 0, 0, 1]),
        "a group's"
    );
    assert!(!command(&driver, &mut ring, 1, 1, &[2, 0]), "cut off");
    assert_eq!(driver.config(0, 6), other);
    driver.write(0x70, 0);
    assert_eq!(driver.config(0, 6), MAC);
}

#[test]
fn commands_that_were_not_agreed_on_are_refused() {
    own_network!("commands_that_were_not_agreed_on_are_refused", ONE_TAP);
    let driver = boot("t0", 1);
    let (.., mut ring) = card(&driver, COMMANDS);
    let mut refuses = |class, code, rest: &[u8]| {
        assert!(
            !command(&driver, &mut ring, class, code, rest),
            "{class}/{code}"
        );
    };
    refuses(1, 1, &[2, 0, 0, 0, 0, 9]);
    refuses(4, 0, &[1, 0]);
    refuses(5, 0, &[0; 8]);
    refuses(0, 0, &[1]);
    refuses(9, 9, &[]);
    let (.., mut ring) = card(&driver, COMMANDS | CTRL_OFFLOADS | GUEST_CSUM);
    // GUEST_TSO4 is offered, but this driver did not want it.
    let offloads = (GUEST_CSUM | 1 << 7).to_le_bytes();
    assert!(!command(&driver, &mut ring, 5, 0, &offloads));
    assert!(command(&driver, &mut ring, 5, 0, &GUEST_CSUM.to_le_bytes()));
    assert!(!driver.has_failed());
}

/// Receivers and senders of all pairs, and the ring for commands.
fn pairs(driver: &Driver, features: u64) -> (Vec<Receiver>, Vec<Sender>, Ring) {
    let mut rings = driver.start(features);
    let commands = rings.pop().expect("the last");
    let (mut receivers, mut senders) = (Vec::new(), Vec::new());
    for (number, ring) in (0u64..).zip(rings) {
        let base = FREE + (number << 20);
        match number % 2 {
            0 => receivers.push(Receiver::new(&driver.memory, ring, base, 128, 1526)),
            _ => senders.push(Sender::new(&driver.memory, ring, base)),
        }
    }
    (receivers, senders, commands)
}

/// Sends from many ports; each flow's datagrams must come in order, all of them once. Gives how
/// many came through each queue.
fn flows(receivers: &mut [Receiver]) -> Vec<usize> {
    const FLOWS: usize = 32;
    const EACH: usize = 8;
    let sockets: Vec<_> = (0..FLOWS)
        .map(|_| {
            let socket = UdpSocket::bind((HOST, 0)).expect("bind");
            socket.connect((GUEST, PORT)).expect("route");
            socket
        })
        .collect();
    for number in 0..EACH {
        for (flow, socket) in sockets.iter().enumerate() {
            socket.send(&[flow as u8, number as u8]).expect("send");
        }
    }
    let mut next = [0; FLOWS];
    let mut counts = vec![0; receivers.len()];
    let deadline = Instant::now() + PATIENCE;
    while counts.iter().sum::<usize>() < FLOWS * EACH {
        assert!(Instant::now() < deadline, "{counts:?}");
        for (count, receiver) in counts.iter_mut().zip(&mut *receivers) {
            while let Some(frame) = receiver.try_frame(Duration::ZERO) {
                let [flow, number] = *frame.payload() else {
                    panic!("{frame:?}")
                };
                assert_eq!(number, next[usize::from(flow)], "flow {flow}");
                next[usize::from(flow)] += 1;
                *count += 1;
            }
        }
    }
    counts
}

#[test]
fn pairs_of_queues_are_used_as_the_driver_asks() {
    own_network!("pairs_of_queues_are_used_as_the_driver_asks", SEVERAL);
    let mut driver = boot("t0", 4);
    assert_ne!(driver.offered() & QUEUES, 0);
    assert_eq!(driver.config(8, 2), [4, 0]);
    let features = COMMANDS | QUEUES | MERGE | EVENT_IDX;
    let (mut receivers, mut senders, mut ring) = pairs(&driver, features);
    let counts = flows(&mut receivers);
    assert_eq!(
        counts[1..],
        [0, 0, 0],
        "one pair until the driver asks for more"
    );
    assert!(command(&driver, &mut ring, 4, 0, &[4, 0]));
    let counts = flows(&mut receivers);
    let used = counts.iter().filter(|&&count| count > 0).count();
    assert!(used > 1, "{counts:?}");
    driver = swap(driver);
    let counts = flows(&mut receivers);
    assert!(
        counts.iter().filter(|&&count| count > 0).count() > 1,
        "{counts:?}"
    );
    let host = host_socket();
    for (number, sender) in (0u8..).zip(&mut senders) {
        sender.send(&datagram(&[number]));
        assert_eq!(received(&host).expect("a datagram"), [number]);
    }
    for wrong in [[0, 0], [5, 0], [0, 128]] {
        assert!(!command(&driver, &mut ring, 4, 0, &wrong), "{wrong:?}");
    }
    // With fewer, no queue of the tap is forgotten.
    for pairs in [3, 1] {
        assert!(command(&driver, &mut ring, 4, 0, &[pairs, 0]));
        let counts = flows(&mut receivers);
        assert!(counts[usize::from(pairs)..].iter().all(|&count| count == 0));
    }
}

#[test]
fn answers_come_by_the_queue_that_the_flow_uses() {
    own_network!("answers_come_by_the_queue_that_the_flow_uses", SEVERAL);
    let driver = boot("t0", 4);
    let host = host_socket();
    let features = COMMANDS | QUEUES | MERGE | EVENT_IDX;
    let (mut receivers, mut senders, mut ring) = pairs(&driver, features);
    assert!(command(&driver, &mut ring, 4, 0, &[4, 0]));
    for (receiver, sender) in receivers.iter_mut().zip(&mut senders).rev() {
        sender.send(&datagram(b"question"));
        assert_eq!(received(&host).expect("a datagram"), b"question");
        host.send(b"answer").expect("send");
        assert_eq!(receiver.frame().payload(), b"answer");
    }
}

#[test]
fn frames_for_a_pair_that_is_given_up_come_by_another() {
    own_network!(
        "frames_for_a_pair_that_is_given_up_come_by_another",
        SEVERAL
    );
    let driver = boot("t0", 4);
    let host = host_socket();
    let features = COMMANDS | QUEUES | MERGE | EVENT_IDX;
    let mut rings = driver.start(features);
    let mut commands = rings.pop().expect("the last");
    assert!(command(&driver, &mut commands, 4, 0, &[4, 0]));
    // The flow is the fourth pair's, which has no buffers; the first has.
    let mut sender = Sender::new(&driver.memory, rings.pop().expect("the fourth"), 32 << 20);
    sender.send(&datagram(b"question"));
    assert_eq!(received(&host).expect("a datagram"), b"question");
    let mut receiver = Receiver::new(&driver.memory, rings.remove(0), FREE, 128, 1526);
    host.send(b"answer").expect("send");
    let other = receiver.try_frame(Duration::from_millis(50));
    assert!(
        other.is_none(),
        "it came by a pair that its flow does not use"
    );
    assert!(command(&driver, &mut commands, 4, 0, &[1, 0]));
    assert_eq!(receiver.frame().payload(), b"answer");
}

#[test]
fn a_driver_that_knows_one_pair_has_its_commands_in_queue_2() {
    own_network!(
        "a_driver_that_knows_one_pair_has_its_commands_in_queue_2",
        SEVERAL
    );
    let driver = boot("t0", 3);
    let mut rings = driver.start(COMMANDS | CTRL_MAC | MERGE);
    assert_eq!(rings.len(), 7);
    let mut ring = rings.remove(2);
    assert!(command(&driver, &mut ring, 1, 1, &[0x02, 9, 9, 9, 9, 9]));
    let mut receiver = [Receiver::new(
        &driver.memory,
        rings.remove(0),
        FREE,
        128,
        1526,
    )];
    flows(&mut receiver);
}

#[test]
fn one_pair_on_a_tap_of_several_queues() {
    own_network!("one_pair_on_a_tap_of_several_queues", SEVERAL);
    let driver = boot("t0", 1);
    let (mut receiver, ..) = card(&driver, MERGE);
    flows(std::slice::from_mut(&mut receiver));
}
