// One client from its first byte to its last: handshake, TLS where it is asked for, transmission.
import Block
import CLinux
import Glibc
import LinuxIO
import Logging

extension Server {
    /// Handshake and transmission of one client.
    func converse(_ client: ClientRecord, input: Int32, output: Int32) {
        let buffer = UnsafeMutableRawBufferPointer.allocate(
            byteCount: Connection<PlainTransport>.inputSize, alignment: Buffer.alignment)
        defer { buffer.deallocate() }
        var link = PlainTransport(input: input, output: output)
        link.setTimeout(seconds: limits.handshakeSeconds)
        var handshake = ServerHandshake(
            directory: directory, client: Credentials(peer: client.peer), tls: tls?.policy ?? .off)
        let deadline = monotonicSeconds() + Double(limits.handshakeSeconds)
        guard ServerHandshake.greeting.withUnsafeBytes({ link.send($0, more: false) }) else {
            return leave(client, hasServed: false)
        }
        switch negotiate(&link, &handshake, client, buffer, until: deadline) {
        case .end:
            noteRefusal(handshake, client)
            leave(client, hasServed: false)
        case .session(let session, let rest): transmit(link, session, client, buffer, rest)
        case .startTLS:
            guard let tls, let session = startTLS(tls, &link, client, until: deadline) else {
                return leave(client, hasServed: false)
            }
            let identity = session.identity
            client.identify(identity)
            handshake.secured(identity)
            let kernelSends = client.isOnTCP && tls.offersKernel && session.kernelSends()
            if !kernelSends { _ = session.sealFast() }
            // A handshake goes through ten times the code that serving does.
            dg_forget_startup_pages()
            log.info("\(client.name): \(identity)\(kernelSends ? ", sent by the kernel" : "")")
            var secured = TLSTransport(link, session: session, kernelSends: kernelSends)
            switch negotiate(&secured, &handshake, client, buffer, until: deadline) {
            case .session(let session, let rest): transmit(secured, session, client, buffer, rest)
            case .end, .startTLS:
                secured.sayGoodbye()
                noteRefusal(handshake, client)
                leave(client, hasServed: false)
            }
        }
    }

    /// The transmission phase.
    private func transmit<Link: Transport & ~Copyable>(
        _ link: consuming Link, _ session: Session, _ client: ClientRecord, _ buffer: UnsafeMutableRawBufferPointer,
        _ rest: Range<Int>
    ) {
        link.setTimeout(seconds: limits.stallSeconds)
        let connections = client.use(session.export)
        // Whoever removes an export has looked for its clients either after this, or before the next line.
        let isStillThere = directory.serves(session.export)
        if isStillThere && connections <= session.export.options.connectionsMax {
            log.info("\(client.name) uses export \"\(session.export.name)\"")
            let bucket = partyBuckets?.enter(client.party)
            var connection = Connection(
                link, session: session, client: client, bucket: bucket, budget: slotBudget, input: buffer,
                received: rest)
            connection.run()
            partyBuckets?.leave(client.party)
        } else if isStillThere {
            refusals.add(
                .limit,
                "refusing \(client.name): export \"\(session.export.name)\" has "
                    + "\(connections - 1) connections, the most at once (--max-per-export)")
            link.sayGoodbye()
        }
        client.use(nil)
        log.info("\(client.name) has gone")
        leave(client, hasServed: true)
    }

    /// How a part of the handshake ended.
    private enum Negotiated {
        /// The connection is over.
        case end
        /// The transmission phase begins; these bytes of the buffer belong to it.
        case session(Session, Range<Int>)
        /// TLS begins.
        case startTLS
    }

    /// Runs the handshake as far as it goes on a link.
    private func negotiate<Link: Transport & ~Copyable>(
        _ link: inout Link, _ handshake: inout ServerHandshake, _ client: ClientRecord,
        _ buffer: UnsafeMutableRawBufferPointer, until deadline: Double
    ) -> Negotiated {
        var count = 0
        while !client.isClosing {
            // Before it is waited for: what TLS has received already does not make the socket readable.
            let space = UnsafeMutableRawBufferPointer(rebasing: buffer[count...])
            switch link.receive(into: space, waiting: false) {
            case .bytes(let got): count += got
            case .closed: return .end
            case .nothing:
                guard waitForInput(link.inputDescriptor, client, until: deadline) else { return .end }
                continue
            }
            // Until nothing more is taken: what is left may hold further options.
            var consumed = -1
            while consumed != 0 && count > 0 {
                var output: [UInt8] = []
                let outcome: ServerHandshake.Outcome
                (consumed, outcome) = handshake.receive(
                    UnsafeRawBufferPointer(rebasing: buffer[..<count]), into: &output)
                if !output.isEmpty, !output.withUnsafeBytes({ link.send($0, more: false) }) { return .end }
                switch outcome {
                case .close:
                    if !handshake.wasAborted && handshake.refusal == nil {
                        refusals.add(.handshake, "refusing \(client.name): its handshake is malformed")
                    }
                    return .end
                case .startTLS: return .startTLS
                case .transmission(let session): return .session(session, consumed..<count)
                case .more:
                    buffer.copyMemory(from: UnsafeRawBufferPointer(rebasing: buffer[consumed..<count]))
                    count -= consumed
                }
            }
        }
        return .end
    }

    /// Counts a client that went after it was refused what it asked for.
    private func noteRefusal(_ handshake: ServerHandshake, _ client: ClientRecord) {
        switch handshake.refusal {
        case .tls? where tls == nil:
            refusals.add(
                .tls,
                "refusing \(client.name): it wants TLS, which is not served here: give keys or certificates "
                    + "(--tls-cert, --tls-psk), or have it use nbd:// if clear text will do")
        case .tls?:
            refusals.add(
                .tls,
                "refusing \(client.name): it does not use TLS, which is required here: have it use nbds:// (QEMU: "
                    + "tls-creds; nbd-client: -x), or serve with --tls allow")
        case let reason?:
            refusals.add(
                reason, "refusing \(client.name): it asked for an export that is not there, or that it may not use")
        case nil: break
        }
    }

    /// Runs the handshake of TLS; nil when it fails.
    private func startTLS(
        _ tls: TLSServer, _ link: inout PlainTransport, _ client: ClientRecord, until deadline: Double
    )
        -> TLSSession?
    {
        do throws(BlockError) {
            let session = try TLSSession(tls.context(), doing: "starting TLS")
            if client.isOnTCP && tls.offersKernel { _ = session.offerKernel(link.inputDescriptor) }
            while true {
                let isDone: Bool
                do throws(BlockError) {
                    isDone = try session.handshake()
                } catch {
                    // An alert may wait that tells the client why; it has to arrive before the connection ends.
                    _ = link.send(session.output, more: false)
                    link.close(waitingSeconds: 1)
                    throw error
                }
                if !link.send(session.output, more: false) { return nil }
                session.removeOutput(session.output.count)
                if isDone { return session }
                guard waitForInput(link.inputDescriptor, client, until: deadline) else { return nil }
                switch link.receive(into: session.inputSpace, waiting: false) {
                case .bytes(let count): session.addInput(count)
                case .nothing: continue
                case .closed: throw session.abandoned()
                }
            }
        } catch {
            refusals.add(.tls, "refusing \(client.name): \(error.message)")
            return nil
        }
    }

    private func waitForInput(_ descriptor: Int32, _ client: ClientRecord, until deadline: Double) -> Bool {
        while !client.isClosing {
            let left = deadline - monotonicSeconds()
            if left <= 0 {
                refusals.add(
                    .handshake, "\(client.name): the handshake took longer than \(limits.handshakeSeconds) s")
                return false
            }
            var ready = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
            let result = poll(&ready, 1, Int32(left * 1000) + 1)
            if result > 0 { return true }
            if result < 0 && errno != EINTR { return false }
        }
        return false
    }
}
