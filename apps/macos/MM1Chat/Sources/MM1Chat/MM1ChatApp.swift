import AppKit
import MM1Kit
import SwiftUI

/// A window: drop a picture, ask, stop, restart.
@main
struct MM1ChatApp: App {
    @NSApplicationDelegateAdaptor(Delegate.self) private var delegate
    @State private var chat = LocalChat()

    var body: some Scene {
        Window("MM1Chat", id: "chat") {
            ChatView(chat.session)
                .frame(minWidth: 420, minHeight: 360)
                .navigationSubtitle(chat.state.description)
                .toolbar {
                    Button("New conversation", systemImage: "square.and.pencil") {
                        Task { await chat.session.clear() }
                    }
                    Button("Restart the model", systemImage: "arrow.clockwise") {
                        Task { await chat.restart() }
                    }
                }
                .task { await chat.start() }
        }
    }
}

private final class Delegate: NSObject, NSApplicationDelegate {
    func applicationDidFinishLaunching(_ notification: Notification) {
        // What `swift run` starts has no bundle that says it is an app with windows.
        NSApplication.shared.setActivationPolicy(.regular)
        NSApplication.shared.activate()
    }

    func applicationShouldTerminateAfterLastWindowClosed(_ sender: NSApplication) -> Bool {
        true
    }
}
