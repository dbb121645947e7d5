#if os(macOS) || os(Linux)
    import Foundation
    import Testing

    @testable import MM1Kit

    /// Where the package's programs are built.
    private var products: URL {
        #if os(macOS)
            final class Here {}
            return Bundle(for: Here.self).bundleURL.deletingLastPathComponent()
        #else
            return Bundle.main.bundleURL
        #endif
    }

    private func running(_ server: MM1Server) throws -> MM1Server.Running {
        guard case .running(let running) = server.state else {
            throw MM1ServerError.stopped
        }
        return running
    }

    @Suite(.serialized) struct ServerTests {
        @Test func aServerThatIsKilledIsStartedAgainUnderTheApp() async throws {
            var chosen = options()
            chosen.pulse = .seconds(5)
            let server = MM1Server(chosen)
            let client = try await server.start()
            let first = try running(server)
            #expect(first.version == MM1Kit.version)
            #if os(Linux)
                let line = try Data(contentsOf: URL(fileURLWithPath: "/proc/\(first.pid)/cmdline"))
                let words = String(decoding: line, as: UTF8.self)
                #expect(words.contains("--exit-with-stdin"))
                #expect(!words.contains(try #require(client.key)))
            #endif

            // While it answers.
            let error = try await thrown(MM1Error.self) {
                for try await _ in client.stream([.user("Hello")], options: endless) {
                    kill(first.pid, SIGKILL)
                }
            }
            guard case .interrupted = error else {
                Issue.record("expected .interrupted, got \(error)")
                return
            }
            try await eventually("it is started again") {
                (try? running(server)).map { $0.pid != first.pid } ?? false
            }
            #expect(try await server.client() == client)
            #expect(try await client.answer([.user("Hello")]).finish.reason == .stop)

            // It lives, but does not answer.
            let second = try running(server)
            kill(second.pid, SIGSTOP)
            try await eventually("it is found out") {
                if case .restarting(_, .unresponsive) = server.state { true } else { false }
            }
            #expect(try await server.client() == client)
            let third = try running(server)
            #expect(!isAlive(second.pid) && isAlive(third.pid))

            await server.stop()
            #expect(server.state == .stopped)
            #expect(!isAlive(third.pid))
            await #expect(throws: MM1ServerError.stopped) { try await server.client() }
        }

        @Test func aPortThatIsTakenIsToldOrLeft() async throws {
            let first = MM1Server(options())
            let client = try await first.start()
            let port = UInt16(try #require(client.url.port))
            var chosen = options()
            chosen.port = .exactly(port)
            let second = MM1Server(chosen)
            await #expect(throws: MM1ServerError.portTaken(port)) { try await second.start() }
            #expect(second.state == .failed(.portTaken(port)))

            chosen.port = .preferring(port)
            var third: MM1Server? = MM1Server(chosen)
            let other = try await #require(third).start()
            #expect(other.url.port != client.url.port)
            #expect(other.key != client.key)
            #expect(try await other.health().status == .ok)

            // The last reference goes.
            let pid = try running(#require(third)).pid
            third = nil
            try await eventually("its server ends") { !isAlive(pid) }
            #expect(try await client.health().status == .ok)
            await first.stop()
        }

        @Test func aServerEndsWithAnAppThatIsKilled() async throws {
            let app = Process()
            app.executableURL = products.appendingPathComponent("mm1-ask")
            app.arguments = ["Hello"]
            let stderr = Pipe()
            app.standardError = stderr
            app.standardOutput = FileHandle.nullDevice
            try app.run()
            var url: URL?
            for await line in lines(of: stderr) {
                let said = line.split(separator: " ").first { $0.hasPrefix("http://") }
                if line.hasPrefix("serving "), let said { url = URL(string: String(said)) }
                if url != nil { break }
            }
            kill(app.processIdentifier, SIGKILL)
            app.waitUntilExit()
            // It was killed, and did not end by itself.
            #expect(app.terminationReason == .uncaughtSignal)
            let client = MM1Client(url: try #require(url), timeout: 30)
            try await eventually("its server ends") {
                do {
                    _ = try await client.health()
                    return false
                } catch MM1Error.unreachable {
                    return true
                }
            }
        }

        @Test func whatCannotStartSaysWhy() async throws {
            var chosen = options()
            chosen.model = "/no/such/model"
            let error = try await thrown(MM1ServerError.self) {
                try await MM1Server(chosen).start()
            }
            guard case .exited(.status(1), let message) = error else {
                Issue.record("expected .exited, got \(error)")
                return
            }
            #expect(message.contains("/no/such/model"))

            chosen = options()
            chosen.startTimeout = .milliseconds(1)
            await #expect(throws: MM1ServerError.notReady(.milliseconds(1))) {
                try await MM1Server(chosen).start()
            }

            chosen.environment["MM1_EXECUTABLE"] = "/no/such/program"
            let missing = MM1Server(chosen)
            let notFound = MM1ServerError.notFound(["/no/such/program"])
            await #expect(throws: notFound) { try await missing.start() }
            #expect(missing.state == .failed(notFound))

            chosen.command = .init(URL(fileURLWithPath: "/no/such/program"))
            let launched = try await thrown(MM1ServerError.self) {
                try await MM1Server(chosen).start()
            }
            guard case .notLaunched = launched else {
                Issue.record("expected .notLaunched, got \(launched)")
                return
            }
        }

        @MainActor @Test func aWindowsModelIsStartedByAQuestionAndRestarted() async throws {
            var chosen = options()
            chosen.command = .init(URL(fileURLWithPath: "/no/such/program"))
            let broken = LocalChat(chosen)
            await broken.start()
            try await eventually("it says why") {
                if case .failed = broken.state { true } else { false }
            }
            #expect(broken.state.description.contains("cannot be run"))

            let chat = LocalChat(options(), answers: AnswerOptions(temperature: 0))
            #expect(chat.state == .stopped)
            await chat.session.ask("What colour is the star?", [try picture("red-star")])?.value
            #expect(chat.session.turns.last?.text.contains("red") == true)
            guard case .running(let first) = chat.state else {
                Issue.record("expected .running, got \(chat.state)")
                return
            }
            #expect(chat.state.description == "mm1-tiny is ready")

            chat.session.options = endless
            let task = try #require(chat.session.ask("Describe it."))
            try await eventually("it begins") {
                chat.session.turns.last?.text.isEmpty == false
            }
            await chat.restart()
            await task.value
            // It was stopped first: half an answer stands, and is no fault.
            #expect(chat.session.problem == nil)
            #expect(chat.session.turns.last?.finish == nil)
            try await eventually("it is another one") {
                if case .running(let second) = chat.state { second.pid != first.pid } else { false }
            }
            #expect(!isAlive(first.pid))
            await chat.stop()
            try await eventually("it is stopped") { chat.state == .stopped }
        }

        @Test func aServerCanBeStoppedWhileItStarts() async throws {
            let server = MM1Server(options())
            let starting = Task { try await server.start() }
            try await eventually("it is started") { server.state == .starting }
            await server.stop()
            #expect(server.state == .stopped)
            await #expect(throws: MM1ServerError.stopped) { try await starting.value }
        }
    }

    @Test func waitsDoubleUpToTheLongest() {
        var backoff = MM1Server.Backoff()
        backoff.first = .seconds(1)
        backoff.longest = .seconds(5)
        backoff.attempts = 4
        let waits = (1...6).map { backoff.delay(after: $0) }
        #expect(waits == [.seconds(1), .seconds(2), .seconds(4), .seconds(5), nil, nil])
    }

    @Test func aCommandKnowsWhoseItIs() {
        let folder = Bundle.main.bundleURL
        let within = folder.appendingPathComponent("python/bin/python3")
        #expect(MM1Server.Command(within).isInside(.main))
        let beside = folder.deletingLastPathComponent()
            .appendingPathComponent(folder.lastPathComponent + "2/mm1")
        #expect(!MM1Server.Command(beside).isInside(.main))
        let above = folder.appendingPathComponent("../mm1")
        #expect(!MM1Server.Command(above).isInside(.main))
    }

    @Test func theCommandIsFound() throws {
        let folder = FileManager.default.temporaryDirectory
            .appendingPathComponent(UUID().uuidString)
        defer { try? FileManager.default.removeItem(at: folder) }
        let (first, second) = ("first", "second")
        for name in [first, second] {
            let path = folder.appendingPathComponent(name)
            try FileManager.default.createDirectory(
                at: path, withIntermediateDirectories: true)
            let file = path.appendingPathComponent("mm1")
            try Data("#!/bin/sh\n".utf8).write(to: file)
            let rights = name == first ? 0o644 : 0o755
            try FileManager.default.setAttributes(
                [.posixPermissions: rights], ofItemAtPath: file.path)
        }
        let path = "\(folder.path)/missing:\(folder.path)/first:\(folder.path)/second"
        let expected = folder.appendingPathComponent("second/mm1").path
        // What cannot be run is passed over.
        let found = try MM1Server.Command.find(environment: ["PATH": path])
        #expect(found.executable.path == expected)
        let named = try MM1Server.Command.find(environment: ["MM1_EXECUTABLE": expected])
        #expect(named.executable.path == expected)
        let missing = folder.appendingPathComponent("missing/mm1").path
        #expect(throws: MM1ServerError.notFound([missing])) {
            try MM1Server.Command.find(environment: ["PATH": path, "MM1_EXECUTABLE": missing])
        }
    }
#endif
